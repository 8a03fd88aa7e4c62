// The trellis encoder, exactly the searches of codes/trellis_search.py, for GPUs whose blocks can form clusters.
//
// With ENDS = 1 a tile is searched from its first pair to its last. With ENDS = 2 one cluster goes forward and another backward, from the
// boundary on both sides of it, and then through a half of the tile each; where they meet, the least sum of both costs says which state
// the best path has. That takes half as long. Read backward, the trellis is the same one with the bits of windows and states in reverse,
// so both run the same code on tables of their own. Neighbouring clusters that meet wait for each other's costs: blocks start in order, so
// the second is there as soon as two clusters have room. A cost that nobody has sent yet is EMPTY, and so it is left again.
//
// PARTS blocks of THREADS threads search TILES tiles together. A thread keeps its share of the 65536 windows in registers for all steps
// and tiles: levels, and 32 times the part of the metric that knows no weights. So a window takes two instructions a step: a dot product
// of two weights and two levels on top of that part, and the sum with the cost of the state before, of which the least is kept. Costs are
// kept as 32 * cost + place, and the place, of the window among 32, comes out of the least sum: ties go to the lowest low bits.
//
// With w = s << BITS | low the new state is s = c * GROUPS + g, and the one before it g << BITS | low. SHARE neighbouring threads have one
// state, and a thread four neighbouring lows of every 4 * SHARE. Costs go to all blocks, what a state's best low bits are to one block for
// each tile, which traces back. A row of costs, of one g, is a little longer than its lows, so that threads of other g read other banks.
//
// Blocks do not meet after a step. A barrier in each block counts the bytes of costs that come in, one for each tile and buffer, so the
// costs of one tile travel while the next is computed. When all have come, every thread has read what they replace a step later. A
// barrier takes its time for everything it counts, so four costs go together.
//
// Macros: BITS, PARTS, THREADS, TILES, ENDS, AROUND (a multiple of 4), FORBIDDEN.

typedef unsigned int u32;
typedef unsigned char u8;

constexpr int PAIRS = 128;
constexpr int STEPS = PAIRS / ENDS;
constexpr int STEPS_AROUND = 2 * AROUND / ENDS;
constexpr int STATES = 1 << (16 - BITS);
constexpr int BRANCHES = 1 << BITS;
constexpr int GROUPS = 1 << (16 - 2 * BITS);
constexpr int EACH = 65536 / (PARTS * THREADS);
constexpr int SHARE = BRANCHES / EACH;
constexpr int ROW = BRANCHES + 4 * SHARE;
constexpr int BUFFER = GROUPS * ROW;
// Of shared memory, in bytes.
constexpr int COSTS = 0;
constexpr int WEIGHTS = COSTS + TILES * 2 * BUFFER * 4;
constexpr int BARRIERS = WEIGHTS + TILES * PAIRS * 4;
constexpr int BOUNDARIES = BARRIERS + TILES * 2 * 8;
constexpr int SURVIVORS = BOUNDARIES + TILES * 4;

static_assert(EACH % 32 == 0 && SHARE >= 1 && SHARE <= 8 && PARTS < 4 && AROUND % 4 == 0, "no such cut");

__device__ __forceinline__ u32 address_in(u32 local, u32 block)
{
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(local), "r"(block));
    return there;
}

__device__ __forceinline__ void put(u32 there, int value)
{
    asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(value) : "memory");
}

// Four costs for another block, counted by a barrier there.
__device__ __forceinline__ void send(u32 there, const int (&costs)[4], u32 barrier)
{
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.s32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(there),
                 "r"(costs[0]), "r"(costs[1]), "r"(costs[2]), "r"(costs[3]), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void expect(u32 barrier, u32 bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity)
{
    u32 done = 0;
    while (!done)
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
}

__device__ __forceinline__ void meet()
{
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// sum + x.lo * levels[0 or 2] + x.hi * levels[1 or 3]
__device__ __forceinline__ int dot_low(u32 x, u32 levels, int sum)
{
    int result;
    asm("dp2a.lo.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(levels), "r"(sum));
    return result;
}

__device__ __forceinline__ int dot_high(u32 x, u32 levels, int sum)
{
    int result;
    asm("dp2a.hi.s32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(levels), "r"(sum));
    return result;
}

__device__ __forceinline__ int square(u32 levels, int byte)
{
    int level = (int)(levels << (24 - 8 * byte)) >> 24;
    return level * level;
}

// Of low bits among the 32 that one accumulator of a thread looks at.
__device__ __forceinline__ int place(int low)
{
    return ((low / (4 * SHARE)) * 4 + (low & 3)) & 31;
}

// Where the block that traces a tile back has its survivors.
__device__ __forceinline__ int survivors_of(int tile)
{
    return SURVIVORS + tile / PARTS * STEPS * STATES;
}

// The number that the other direction has for a state, and for a window.
__device__ __forceinline__ int reversed_state(int state)
{
    return __brev(state) >> (16 + BITS);
}

__device__ __forceinline__ int reversed_window(int window)
{
    return __brev(window) >> 16;
}

// A cost for the other cluster, and one from there: costs are words that are EMPTY or not, so nothing else has to be said.
constexpr int EMPTY = 0x80000000;

__device__ __forceinline__ void hand_over(int* there, int cost)
{
    asm volatile("st.relaxed.gpu.global.s32 [%0], %1;" ::"l"(there), "r"(cost) : "memory");
}

__device__ __forceinline__ int receive(int* here)
{
    int cost;
    do
        asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(cost) : "l"(here) : "memory");
    while (cost == EMPTY);
    hand_over(here, EMPTY);
    return cost;
}

// Where the cost of a state is.
__device__ __forceinline__ int at(int state)
{
    return state / BRANCHES * ROW + state % BRANCHES;
}

struct Thread
{
    u32 levels[EACH / 2];
    int part[EACH];
    int state, group, share, direction;
    u32 here, everywhere[PARTS];
};

// Steps from pair `begin` on. Costs begin and end in the first of the two buffers; all barriers have completed an even number of phases.
template <bool survivors>
__device__ __forceinline__ void search(const Thread& mine, u8* memory, int begin, int steps)
{
    // Four neighbouring states and their threads: all of these know all results, and each does something else with them.
    const int four_threads = 4 * SHARE, first = mine.state & ~3, role = threadIdx.x % four_threads;
    const int first_place = place(first & (BRANCHES - 1));
    for (int step = 0; step < steps; step++)
    {
        const int pair = (begin + mine.direction * step) & (PAIRS - 1), old = step & 1;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
        {
            const int incoming = BARRIERS + (tile * 2 + (old ^ 1)) * 8;
            if (threadIdx.x == 0)
                expect(mine.here + incoming, STATES * 4);
            if (step > 0)
                wait(mine.here + BARRIERS + (tile * 2 + old) * 8, (step - 1) / 2 & 1);
            const u32 x = *(const u32*)(memory + WEIGHTS + (tile * PAIRS + pair) * 4);
            const int* costs = (const int*)(memory + COSTS) + (tile * 2 + old) * BUFFER;
            const int4* from = (const int4*)(costs + mine.group * ROW) + mine.share;
            int least = 0x7fffffff;
#pragma unroll
            for (int half = 0; half < EACH / 32; half++)
            {
                int best = 0x7fffffff;
#pragma unroll
                for (int four = half * 8; four < half * 8 + 8; four++)
                {
                    const int4 cost = from[four * SHARE];
                    best = min(best, dot_low(x, mine.levels[2 * four], mine.part[4 * four]) + cost.x);
                    best = min(best, dot_high(x, mine.levels[2 * four], mine.part[4 * four + 1]) + cost.y);
                    best = min(best, dot_low(x, mine.levels[2 * four + 1], mine.part[4 * four + 2]) + cost.z);
                    best = min(best, dot_high(x, mine.levels[2 * four + 1], mine.part[4 * four + 3]) + cost.w);
                }
                const int low = (half * 8 + ((best & 31) >> 2)) * 4 * SHARE + mine.share * 4 + (best & 3);
                least = min(least, ((best >> 5) << 8) | low);
            }
#pragma unroll
            for (int distance = 1; distance < SHARE; distance *= 2)
                least = min(least, __shfl_xor_sync(0xffffffffu, least, distance));
            // What is subtracted from all costs changes no decision.
            const int zero = costs[0] >> 5;
            int values[4];
            u32 lows = 0;
#pragma unroll
            for (int next = 0; next < 4; next++)
            {
                const int found = __shfl_sync(0xffffffffu, least, (threadIdx.x & (32 - four_threads)) | next * SHARE);
                values[next] = (((found >> 8) - zero) << 5) | (first_place + next);
                lows |= (u32)(found & 255) << 8 * next;
            }
            const int to = COSTS + ((tile * 2 + (old ^ 1)) * BUFFER + at(first)) * 4;
#pragma unroll
            for (int block = 0; block < PARTS; block++)
                if (role == block)
                    send(mine.everywhere[block] + to, values, mine.everywhere[block] + incoming);
            if (survivors && role == PARTS)
                put(mine.everywhere[tile % PARTS] + survivors_of(tile) + step * STATES + first, lows);
        }
    }
    for (int tile = 0; tile < TILES; tile++)
        wait(mine.here + BARRIERS + tile * 2 * 8, (steps - 1) / 2 & 1);
    meet();
}

// The cheapest of all states, ties: the lowest, of which `cost` knows the costs; by one warp.
template <class Cost>
__device__ __forceinline__ int cheapest(const Cost& cost)
{
    long long best = 0x7fffffffffffffffll;
    for (int state = threadIdx.x % 32; state < STATES; state += 32)
        best = min(best, ((long long)cost(state) << 16) | state);
    for (int distance = 1; distance < 32; distance *= 2)
        best = min(best, __shfl_xor_sync(0xffffffffu, best, distance));
    return (int)(best & 0xffff);
}

// The state after pair 127 of the best path around the tile's boundary; by one warp of the block that has the survivors.
__device__ __forceinline__ int boundary_state(const u8* memory, int tile)
{
    const int* costs = (const int*)(memory + COSTS) + tile * 2 * BUFFER;
    int state = cheapest([&](int s) { return costs[at(s)] >> 5; });
    for (int step = 2 * AROUND - 1; step >= AROUND; step--)
        state = ((state << BITS) | memory[survivors_of(tile) + step * STATES + state]) & (STATES - 1);
    return state;
}

// The state in which the best path goes from one cluster's pairs to the other's; by one warp of both. `meeting` has room for the costs that
// both send, int [2, STATES], by the numbers that the states have forward.
__device__ __forceinline__ int meeting_state(const u8* memory, int tile, int* meeting, int end)
{
    const int* costs = (const int*)(memory + COSTS) + tile * 2 * BUFFER;
    const auto own = [&](int s) { return costs[at(end ? reversed_state(s) : s)] >> 5; };
    for (int state = threadIdx.x % 32; state < STATES; state += 32)
        hand_over(meeting + end * STATES + state, own(state));
    const int state = cheapest([&](int s) { return own(s) + receive(meeting + (1 - end) * STATES + s); });
    return end ? reversed_state(state) : state;
}

// fixed: [tiles, 256]. levels: [ENDS, 65536, 2], for ENDS = 2 forward and backward. windows: [tiles, 128]. meetings: for ENDS = 2 [tiles, 2,
// 2, STATES], all EMPTY before and after.
extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS, 1)
    encode(const short* fixed, const signed char* levels, int* windows, int* meetings, int tiles)
{
    extern __shared__ __align__(16) u8 memory[];
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    const int cluster = blockIdx.x / PARTS, end = cluster % ENDS, first = cluster / ENDS * TILES;

    Thread mine;
    const int number = threadIdx.x / SHARE;
    mine.share = threadIdx.x % SHARE;
    mine.state = rank * (STATES / PARTS) + number;
    mine.group = mine.state % GROUPS;
    mine.direction = end ? -1 : 1;
#pragma unroll
    for (int four = 0; four < EACH / 4; four++)
    {
        const int window = end * 65536 + mine.state * BRANCHES + four * 4 * SHARE + mine.share * 4;
        const uint2 pairs = *(const uint2*)(levels + 2 * window);
        mine.levels[2 * four] = pairs.x;
        mine.levels[2 * four + 1] = pairs.y;
        mine.part[4 * four] = 64 * (square(pairs.x, 0) + square(pairs.x, 1));
        mine.part[4 * four + 1] = 64 * (square(pairs.x, 2) + square(pairs.x, 3));
        mine.part[4 * four + 2] = 64 * (square(pairs.y, 0) + square(pairs.y, 1));
        mine.part[4 * four + 3] = 64 * (square(pairs.y, 2) + square(pairs.y, 3));
    }
    mine.here = (u32)__cvta_generic_to_shared(memory);
#pragma unroll
    for (int block = 0; block < PARTS; block++)
        mine.everywhere[block] = address_in(mine.here, block);
    if (threadIdx.x == 0)
    {
        for (int barrier = 0; barrier < TILES * 2; barrier++)
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(mine.here + BARRIERS + barrier * 8) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    // A warp traces a tile back, in a block of its own as far as there are enough.
    const int traced = rank + threadIdx.x / 32 * PARTS;
    const bool real = traced < TILES && first + traced < tiles;
    int* const meeting = meetings + (long long)(first + traced) * 4 * STATES;

    asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
    for (int index = threadIdx.x; index < TILES * PAIRS; index += THREADS)
    {
        const int tile = first + index / PAIRS;
        const short* pair = fixed + 2 * ((long long)tile * PAIRS + index % PAIRS);
        const u32 x0 = tile < tiles ? (u32)(-32 * pair[0]) : 0, x1 = tile < tiles ? (u32)(-32 * pair[1]) : 0;
        *(u32*)(memory + WEIGHTS + index * 4) = (x0 & 0xffff) | (x1 << 16);
    }
    for (int index = threadIdx.x; index < TILES * STATES; index += THREADS)
        ((int*)(memory + COSTS))[index / STATES * 2 * BUFFER + at(index % STATES)] = place(index % STATES & (BRANCHES - 1));
    __syncthreads();
    meet();
    search<ENDS == 1>(mine, memory, end ? AROUND - 1 : PAIRS - AROUND, STEPS_AROUND);
    if (traced < TILES)
    {
        int state = 0;
        if (real)
            state = ENDS == 1 ? boundary_state(memory, traced) : meeting_state(memory, traced, meeting, end);
        if (threadIdx.x % 32 < PARTS)
            put(address_in(mine.here, threadIdx.x % 32) + BOUNDARIES + traced * 4, state);
    }
    meet();
    for (int index = threadIdx.x; index < TILES * STATES; index += THREADS)
    {
        const int state = index % STATES, boundary = ((const int*)(memory + BOUNDARIES))[index / STATES];
        const int cost = state == boundary ? 0 : FORBIDDEN;
        ((int*)(memory + COSTS))[index / STATES * 2 * BUFFER + at(state)] = cost * 32 + place(state & (BRANCHES - 1));
    }
    __syncthreads();
    meet();
    search<true>(mine, memory, end ? PAIRS - 1 : 0, STEPS);
    if (!real)
        return;
    int state = ((const int*)(memory + BOUNDARIES))[traced];
    if (ENDS == 2)
        state = meeting_state(memory, traced, meeting + 2 * STATES, end);
    if (threadIdx.x % 32 != 0)
        return;
    for (int step = STEPS - 1; step >= 0; step--)
    {
        const int window = (state << BITS) | memory[survivors_of(traced) + step * STATES + state];
        const int pair = end ? PAIRS - 1 - step : step;
        windows[(long long)(first + traced) * PAIRS + pair] = end ? reversed_window(window) : window;
        state = window & (STATES - 1);
    }
}
