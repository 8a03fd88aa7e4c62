// States and their costs: where they are, which is the cheapest, and where two searches meet. encode.cu says what it is about.

constexpr int PAIRS = 128;
constexpr int STEPS = PAIRS / ENDS;
constexpr int STEPS_AROUND = 2 * AROUND / ENDS;
constexpr int STATES = 1 << (16 - BITS);
constexpr int BRANCHES = 1 << BITS;
constexpr int GROUPS = 1 << (16 - 2 * BITS);
constexpr int WARPS = THREADS / 32;
constexpr int EACH = 65536 / (PARTS * THREADS);
constexpr int LOWS = EACH / SIDE;
constexpr int QUADS = LOWS / 4;
constexpr int SHARE = BRANCHES / LOWS;
constexpr int SETS = 32 / SHARE;
constexpr int PLACES = LOWS;
// Low bits that differ in their first two are so far apart.
constexpr int APART = BRANCHES / 4;
// So many warps trace a tile back.
constexpr int GANG = WARPS / ((TILES + PARTS - 1) / PARTS);
constexpr int BUFFERS = 3;
// SHARE times it is 2^32.
constexpr int TAG = (1 << 30) / (SHARE / 4);
// By levels up to 127 and inputs up to 1020.
constexpr int MIDDLE = 4 * 127 * 127;
constexpr int FARTHEST = 2 * 1020 * 127;
constexpr int SEGMENT = 1 << (13 - BITS);
// Of shared memory, in bytes.
constexpr int COSTS = 0;
constexpr int WEIGHTS = COSTS + TILES * BUFFERS * STATES * 4;
constexpr int BOUNDARIES = WEIGHTS + TILES * PAIRS * 4;
constexpr int LEASTS = BOUNDARIES + TILES * 4;
constexpr int CHEAPEST = LEASTS + TILES * 4;
constexpr int SURVIVORS = CHEAPEST + WARPS * 8;

static_assert(SHARE >= 4 && PLACES * 1020 < 1 << 15 && WARPS % GROUPS == 0 && PARTS == 2 && AROUND % 4 == 0, "no such cut");
static_assert((STEPS < SEGMENT || STEPS % SEGMENT == 0) && (STEPS_AROUND < SEGMENT || STEPS_AROUND % SEGMENT == 0), "whole segments");
static_assert((long long)SEGMENT * FARTHEST << BITS < 1ll << 31, "costs have room");
static_assert((long long)(FORBIDDEN + 2 * FARTHEST) << BITS < 1ll << 31, "as much as that costs the first states");

// Of low bits among those that a thread looks at: the first two and the last ones say it, those in between are the thread's share.
__device__ __forceinline__ int place(int low)
{
    return low / APART * QUADS + low % QUADS;
}

// Of a word of costs, whatever its sign.
__device__ __forceinline__ int cost_of(int word)
{
    return (int)((u32)word * SHARE) >> BITS;
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

// Where the cost of a state is: four that a thread reads at once are neighbours, and so are those that SHARE threads read at once.
__device__ __forceinline__ int at(int state)
{
    const int low = state % BRANCHES;
    return state - low + (low % QUADS * SHARE + low / QUADS % SHARE) * 4 + low / APART;
}

// The costs after so many steps of a segment.
__device__ __forceinline__ const int* costs_after(const u8* memory, int tile, int steps)
{
    return (const int*)(memory + COSTS) + (tile * BUFFERS + steps % BUFFERS) * STATES;
}

// The cheapest of a tile's states, ties: the lowest; of those that the threads of a gang know, by all threads of a block.
__device__ __forceinline__ int cheapest(u8* memory, int cost, int state)
{
    const int warp = threadIdx.x / 32, gang = warp / GANG;
    int2* const all = (int2*)(memory + CHEAPEST);
    const int least = __reduce_min_sync(0xffffffffu, cost);
    state = __reduce_min_sync(0xffffffffu, cost == least ? state : STATES);
    if (threadIdx.x % 32 == 0)
        all[warp] = make_int2(least, state);
    __syncthreads();
    int2 best = all[gang * GANG];
#pragma unroll
    for (int other = 1; other < GANG; other++)
    {
        const int2 its = all[gang * GANG + other];
        if (its.x < best.x || (its.x == best.x && its.y < best.y))
            best = its;
    }
    return best.y;
}

// The state after pair 127 of the best path around the tile's boundary; by the gang of a block that has the survivors.
__device__ __forceinline__ int boundary_state(u8* memory, int tile, int steps)
{
    const int* costs = costs_after(memory, tile, steps);
    int least = 0x7fffffff, state = 0;
    for (int own = threadIdx.x % (32 * GANG); own < STATES; own += 32 * GANG)
    {
        const int cost = cost_of(costs[at(own)]);
        state = cost < least ? own : state;
        least = min(least, cost);
    }
    state = cheapest(memory, least, state);
    for (int step = 2 * AROUND - 1; step >= AROUND; step--)
        state = ((state << BITS) | memory[survivors_of(tile) + step * STATES + state]) & (STATES - 1);
    return state;
}

// The state in which the best path goes from one cluster's pairs to the other's; by gangs of both. `meeting` has room for the costs that
// both send, int [2, STATES], by the numbers that the states have forward.
__device__ __forceinline__ int meeting_state(u8* memory, int tile, int* meeting, int end, int steps, bool real)
{
    constexpr int OWN = STATES / (32 * GANG);
    const int* costs = costs_after(memory, tile, steps);
    const int first = threadIdx.x % (32 * GANG);
    int least = 0x7fffffff, state = 0;
    if (real)
    {
        int own[OWN], there[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++)
        {
            const int its = first + i * 32 * GANG;
            own[i] = cost_of(costs[at(end ? reversed_state(its) : its)]);
            hand_over(meeting + end * STATES + its, own[i]);
        }
        receive<OWN, 32 * GANG>(meeting + (1 - end) * STATES + first, there);
#pragma unroll
        for (int i = 0; i < OWN; i++)
        {
            state = own[i] + there[i] < least ? first + i * 32 * GANG : state;
            least = min(least, own[i] + there[i]);
        }
    }
    state = cheapest(memory, least, state);
    return end ? reversed_state(state) : state;
}
