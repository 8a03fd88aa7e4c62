// A GPU on one thread of a processor, as far as encode.cu needs one: in place of exchange.cu, with the words of CUDA that it uses.
//
// Each thread of some blocks is a fiber. They take turns in another order each time, whenever they wait for each other. What a block sends to
// another one arrives some turns later, in the order of each thread and in no other; a barrier of the cluster waits for it.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <ucontext.h>
#include <vector>

typedef unsigned int u32;
typedef unsigned char u8;

using std::max;
using std::min;

#define __device__
#define __global__
#define __forceinline__ inline
#define __cluster_dims__(...)
#define __launch_bounds__(...)

struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }

struct Store
{
    u32 there;
    int value, bytes;
};

struct Fiber
{
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    int block, thread;
    bool done;
    std::deque<Store> stores;
};

// Threads that wait until all of them are here.
struct Gathering
{
    int arrived = 0;
    long turn = 0;
    int values[2][32];
};

struct Machine
{
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<std::vector<u8>> memories;
    std::vector<Gathering> warps, blocks, clusters;
    std::mt19937 random;
    int first_block, bytes, now;
};
inline Machine machine;

inline Fiber& me() { return machine.fibers[machine.now]; }
inline void pause() { swapcontext(&me().context, &machine.scheduler); }

struct { struct { operator int() const { return me().thread; } } x; } inline threadIdx;
struct { struct { operator int() const { return machine.first_block + me().block; } } x; } inline blockIdx;

inline void fail(const char* what)
{
    std::fprintf(stderr, "%s: block %d, thread %d\n", what, machine.first_block + me().block, me().thread);
    std::abort();
}

inline long gather(Gathering& all, int count)
{
    const long turn = all.turn;
    if (++all.arrived == count)
    {
        all.arrived = 0;
        all.turn++;
    }
    while (all.turn == turn)
        pause();
    return turn & 1;
}

// What all threads of a warp say.
inline const int* told(int value)
{
    Gathering& warp = machine.warps[me().block * (THREADS / 32) + me().thread / 32];
    warp.values[warp.turn & 1][me().thread % 32] = value;
    return warp.values[gather(warp, 32)];
}

inline void __syncwarp() { told(0); }
inline void __syncthreads() { gather(machine.blocks[me().block], THREADS); }
inline int __shfl_xor_sync(u32, int value, int distance) { return told(value)[me().thread % 32 ^ distance]; }
inline int __reduce_min_sync(u32, int value)
{
    const int* all = told(value);
    return *std::min_element(all, all + 32);
}
inline bool __any_sync(u32, bool value)
{
    const int* all = told(value);
    return *std::max_element(all, all + 32);
}

inline u32 __brev(u32 value)
{
    u32 result = 0;
    for (int bit = 0; bit < 32; bit++)
        result |= (value >> bit & 1) << (31 - bit);
    return result;
}

inline int byte_of(u32 bytes, int which) { return (signed char)(bytes >> 8 * which); }
inline int half_of(u32 halves, int which) { return (short)(halves >> 16 * which); }
inline int __dp4a(int a, int b, int sum)
{
    for (int i = 0; i < 4; i++)
        sum += byte_of(a, i) * byte_of(b, i);
    return sum;
}
inline int dot_low(u32 x, u32 levels, int sum) { return sum + half_of(x, 0) * byte_of(levels, 0) + half_of(x, 1) * byte_of(levels, 1); }
inline int dot_high(u32 x, u32 levels, int sum) { return sum + half_of(x, 0) * byte_of(levels, 2) + half_of(x, 1) * byte_of(levels, 3); }
inline int choose(bool first, int a, int b) { return first ? a : b; }

inline void keep_known(u32&, u32&, int&) {}
inline void follow() {}

// An address: the block in its cluster, and where in its memory.
inline u32 block_in_cluster() { return me().block % PARTS; }
inline u32 address_in(u32 local, u32 block) { return (local & 0xffffff) | (block + 1) << 24; }
inline u32 address_of(const u8*) { return address_in(0, block_in_cluster()); }
inline u8* own_memory() { return machine.memories[me().block].data(); }

inline u8* at_address(const Fiber& whose, u32 address, int bytes)
{
    const u32 place = address & 0xffffff, block = (address >> 24) - 1;
    if (block >= PARTS || place % bytes || place + bytes > (u32)machine.bytes)
        fail("no such address");
    return machine.memories[whose.block / PARTS * PARTS + block].data() + place;
}

inline void arrive(Fiber& sender)
{
    const Store store = sender.stores.front();
    sender.stores.pop_front();
    u8* const there = at_address(sender, store.there, store.bytes);
    if (store.bytes == 1)
        *there = store.value;
    else
        *(int*)there = store.value;
}

inline void send(bool when, u32 there, int word)
{
    if (when)
        me().stores.push_back({there, word, 4});
}

inline void keep(bool when, u32 here, int word)
{
    if (when)
        *(int*)at_address(me(), here, 4) = word;
}

inline void send_byte(bool when, u32 there, int byte)
{
    if (when)
        me().stores.push_back({there, byte, 1});
}

inline int4 load(u32 here) { return *(const int4*)at_address(me(), here, 16); }

constexpr int UNKNOWN = -1;

inline void wait_for(u32 here)
{
    while (*(const int*)at_address(me(), here, 4) == UNKNOWN)
        pause();
}

inline void meet()
{
    while (!me().stores.empty())
        arrive(me());
    gather(machine.clusters[me().block / PARTS], PARTS * THREADS);
}

constexpr int EMPTY = 0x80000000;

inline void hand_over(int* there, int cost)
{
    if (*there != EMPTY && cost != EMPTY)
        fail("something has been left here");
    *there = cost;
}

template <int count, int apart>
inline void receive(int* here, int (&costs)[count])
{
    for (int i = 0; i < count; i++)
    {
        while (here[i * apart] == EMPTY)
            pause();
        costs[i] = here[i * apart];
        hand_over(here + i * apart, EMPTY);
    }
}

extern "C" void encode(const short* fixed, const signed char* levels, int* windows, int* meetings, int tiles);

inline struct Arguments
{
    const short* fixed;
    const signed char* levels;
    int *windows, *meetings, tiles;
} arguments;

inline void run_fiber()
{
    encode(arguments.fixed, arguments.levels, arguments.windows, arguments.meetings, arguments.tiles);
    me().done = true;
    pause();
}

// Runs a grid, as many blocks at a time as wait for each other. Returns whether all have ended within so many turns.
extern "C" int run_grid(Arguments given, int blocks, int bytes, u32 seed, long turns)
{
    constexpr int together = PARTS * ENDS, stack = 1 << 15;
    arguments = given;
    machine.random.seed(seed);
    machine.bytes = bytes;
    for (machine.first_block = 0; machine.first_block < blocks; machine.first_block += together)
    {
        machine.fibers = std::vector<Fiber>(together * THREADS);
        machine.memories.assign(together, std::vector<u8>(bytes));
        machine.warps.assign(together * THREADS / 32, {});
        machine.blocks.assign(together, {});
        machine.clusters.assign(ENDS, {});
        for (auto& memory : machine.memories)
            for (u8& byte : memory)
                byte = machine.random();
        std::vector<int> order;
        for (int number = 0; number < together * THREADS; number++)
        {
            Fiber& fiber = machine.fibers[number];
            fiber.stack = std::make_unique<char[]>(stack);
            fiber.block = number / THREADS;
            fiber.thread = number % THREADS;
            fiber.done = false;
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.get();
            fiber.context.uc_stack.ss_size = stack;
            makecontext(&fiber.context, run_fiber, 0);
            order.push_back(number);
        }
        for (long turn = 0; !order.empty(); turn++)
        {
            if (turn == turns)
                return 0;
            std::shuffle(order.begin(), order.end(), machine.random);
            for (int number : order)
            {
                machine.now = number;
                swapcontext(&machine.scheduler, &me().context);
                while (!me().stores.empty() && machine.random() % 2)
                    arrive(me());
            }
            order.erase(std::remove_if(order.begin(), order.end(), [](int n) { return machine.fibers[n].done; }), order.end());
        }
    }
    return 1;
}
