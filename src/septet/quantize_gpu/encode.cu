// The trellis encoder, exactly the searches of codes/trellis_search.py, for GPUs whose blocks can form clusters.
//
// With ENDS = 1 a tile is searched from its first pair to its last. With ENDS = 2 one cluster goes forward and another backward, from the
// boundary on both sides of it, and then through a half of the tile each; where they meet, the least sum of both costs says which state
// the best path has. That takes half as long. Read backward, the trellis is the same one with the bits of windows and states in reverse,
// so both run the same code on tables of their own. Neighbouring clusters that meet wait for each other's costs: blocks start in order, so
// the second is there as soon as two clusters have room. A cost that nobody has sent yet is EMPTY, and so it is left again.
//
// PARTS blocks of THREADS threads search TILES tiles together. A thread keeps its share of the 65536 windows in registers for all steps
// and tiles: levels, and PLACES times the part of the metric that knows no weights. So a window takes two instructions a step: a dot product
// of two weights and two levels on top of that part, and the sum with the cost of the state before, of which the least is kept. Costs are
// kept as PLACES * cost + place, and the place, of the window among those of a state, comes out of the least sum: ties go to the lowest low
// bits.
//
// With w = s << BITS | low the new state is s = c * GROUPS + g, and the one before it g << BITS | low. SHARE neighbouring threads have SIDE
// states of neighbouring c and the same g, so each cost that a thread reads serves SIDE windows. Of the lows a thread has four neighbours of
// every 4 * SHARE. Costs go to all blocks, what a state's best low bits are to one block for each tile, which traces back. A row of costs,
// of one g, is a little longer than its lows, so that threads of other g read other banks.
//
// Blocks do not meet after a step. A barrier in each block counts the bytes of costs that come in, one for each tile and buffer, so the
// costs of one tile travel while the next is computed; and what a thread has found of one tile it shuffles and sends while it looks at the
// next, since shuffles are waited for. When all have come, every thread has read what they replace a step later. A barrier takes its time
// for everything it counts, so four costs go together.
//
// What blocks and clusters say to each other is in exchange.cu, which comes before this.
//
// Macros: BITS, PARTS (2), THREADS (512), SIDE (4), TILES, ENDS, AROUND (a multiple of 4), FORBIDDEN.

constexpr int PAIRS = 128;
constexpr int STEPS = PAIRS / ENDS;
constexpr int STEPS_AROUND = 2 * AROUND / ENDS;
constexpr int STATES = 1 << (16 - BITS);
constexpr int BRANCHES = 1 << BITS;
constexpr int GROUPS = 1 << (16 - 2 * BITS);
constexpr int EACH = 65536 / (PARTS * THREADS);
constexpr int LOWS = EACH / SIDE;
constexpr int SHARE = BRANCHES / LOWS;
constexpr int SETS = 32 / SHARE;
constexpr int PLACE_BITS = 4;
constexpr int PLACES = 1 << PLACE_BITS;
// What a step finds for a state is kept as 2^COST_BITS * cost + low.
constexpr int COST_BITS = PLACE_BITS + (SHARE == 4 ? 2 : SHARE == 8 ? 3 : 4);
constexpr int ROW = BRANCHES + 4 * SHARE;
constexpr int BUFFER = GROUPS * ROW;
// Of shared memory, in bytes.
constexpr int COSTS = 0;
constexpr int WEIGHTS = COSTS + TILES * 2 * BUFFER * 4;
constexpr int BARRIERS = WEIGHTS + TILES * PAIRS * 4;
constexpr int BOUNDARIES = BARRIERS + TILES * 2 * 8;
constexpr int SURVIVORS = BOUNDARIES + TILES * 4;

static_assert(LOWS == PLACES && 1 << COST_BITS == PLACES * SHARE && PARTS == 2 && AROUND % 4 == 0, "no such cut");
static_assert((long long)FORBIDDEN << COST_BITS <= 1ll << 30, "as much room again for the costs of a path");
static_assert(GROUPS == 1 || (GROUPS % SETS == 0 && SETS % 4 == 0), "four neighbouring states are in one warp");

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

// Of low bits among those that a thread looks at.
__device__ __forceinline__ int place(int low)
{
    return low / (4 * SHARE) * 4 + (low & 3);
}

// Of what is kept of a state: PLACES * cost + place.
__device__ __forceinline__ int cost_of(int kept)
{
    return kept >> PLACE_BITS;
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

// Where the cost of a state is.
__device__ __forceinline__ int at(int state)
{
    return state / BRANCHES * ROW + state % BRANCHES;
}

struct Thread
{
    u32 levels[EACH / 2];
    int part[EACH];
    // `first` of four neighbouring states, of which it is to send or to put down what its warp finds.
    int group, share, direction, first;
    u32 here, everywhere[PARTS];
};

// Without a branch: one that shuffles on both sides would be taken by neighbouring threads in turns.
__device__ __forceinline__ int choose(bool first, int a, int b)
{
    int result;
    asm("{\n.reg .pred p;\nsetp.ne.s32 p, %3, 0;\nselp.s32 %0, %1, %2, p;\n}" : "=r"(result) : "r"(a), "r"(b), "r"((int)first));
    return result;
}

// The least of all SHARE threads for each of their SIDE states: for side i in the threads whose share is in part i of SIDE.
__device__ __forceinline__ int least_of_sides(const int (&sides)[SIDE], int share)
{
    static_assert(SIDE == 4, "two halvings");
    const bool upper = share & SHARE / 2, odd = share & SHARE / 4;
    int kept[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        kept[i] = min(choose(upper, sides[i + 2], sides[i]), __shfl_xor_sync(0xffffffffu, choose(upper, sides[i], sides[i + 2]), SHARE / 2));
    int least = min(choose(odd, kept[1], kept[0]), __shfl_xor_sync(0xffffffffu, choose(odd, kept[0], kept[1]), SHARE / 4));
#pragma unroll
    for (int distance = SHARE / 8; distance > 0; distance /= 2)
        least = min(least, __shfl_xor_sync(0xffffffffu, least, distance));
    return least;
}

// What a step finds of a tile: for each state of a thread the least cost and the low bits it comes from, of those that the thread looks at.
__device__ __forceinline__ void look(const Thread& mine, const int* costs, u32 x, int (&best)[SIDE])
{
    const int4* from = (const int4*)(costs + mine.group * ROW) + mine.share;
#pragma unroll
    for (int side = 0; side < SIDE; side++)
        best[side] = 0x7fffffff;
#pragma unroll
    for (int four = 0; four < LOWS / 4; four++)
    {
        const int4 cost = from[four * SHARE];
#pragma unroll
        for (int side = 0; side < SIDE; side++)
        {
            const u32* levels = mine.levels + (side * LOWS + 4 * four) / 2;
            const int* part = mine.part + side * LOWS + 4 * four;
            best[side] = min(best[side], dot_low(x, levels[0], part[0]) + cost.x);
            best[side] = min(best[side], dot_high(x, levels[0], part[1]) + cost.y);
            best[side] = min(best[side], dot_low(x, levels[1], part[2]) + cost.z);
            best[side] = min(best[side], dot_high(x, levels[1], part[3]) + cost.w);
        }
    }
}

// Steps from pair `begin` on. Costs begin and end in the first of the two buffers; all barriers have completed an even number of phases.
template <bool survivors>
__device__ __forceinline__ void search(const Thread& mine, u8* memory, int begin, int steps)
{
    // SHARE threads know the results of four neighbouring states, and each does something else with them: those of one c and four sets, or,
    // where there is one g, of one set.
    const int lane = threadIdx.x % 32, set = lane / SHARE, role = mine.share, first_place = place(mine.first & (BRANCHES - 1));
    const int lane_of_first = GROUPS == 1 ? set * SHARE : set / 4 * 4 * SHARE + set % 4 * (SHARE / SIDE);
    constexpr int lanes_between = GROUPS == 1 ? SHARE / SIDE : SHARE;
    int best[SIDE] = {};
    const auto pass_on = [&](int tile, int step, bool real) {
        const int old = step & 1, incoming = BARRIERS + (tile * 2 + (old ^ 1)) * 8;
        const int* costs = (const int*)(memory + COSTS) + (tile * 2 + old) * BUFFER;
        int sides[SIDE];
        // The lower two bits of the place are those of low, the share comes between them and the others.
#pragma unroll
        for (int side = 0; side < SIDE; side++)
            sides[side] = best[side] * SHARE + mine.share * 4 - (best[side] & 3) * (SHARE - 1);
        const int least = least_of_sides(sides, mine.share);
        // What is subtracted from all costs changes no decision.
        const int zero = cost_of(costs[0]);
        int values[4];
        u32 lows = 0;
#pragma unroll
        for (int next = 0; next < 4; next++)
        {
            const int found = __shfl_sync(0xffffffffu, least, lane_of_first + next * lanes_between);
            values[next] = ((found >> COST_BITS) - zero) * PLACES + first_place + next;
            lows |= (u32)(found & (BRANCHES - 1)) << 8 * next;
        }
        const int to = COSTS + ((tile * 2 + (old ^ 1)) * BUFFER + at(mine.first)) * 4;
        const u32 block = choose(role == 0, mine.everywhere[0], mine.everywhere[PARTS - 1]);
        send(role < PARTS && real, block + to, values, block + incoming);
        if (survivors)
            put(role == PARTS && real, mine.everywhere[tile % PARTS] + survivors_of(tile) + step * STATES + mine.first, lows);
    };
    // Of several tiles each is passed on with the next one's turn; before the first step there is none.
    for (int step = 0; step < steps; step++)
    {
        const int pair = (begin + mine.direction * step) & (PAIRS - 1), old = step & 1;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
        {
            if (threadIdx.x == 0)
                expect(mine.here + BARRIERS + (tile * 2 + (old ^ 1)) * 8, STATES * 4);
            if (step > 0)
                wait(mine.here + BARRIERS + (tile * 2 + old) * 8, (step - 1) / 2 & 1);
            if (TILES > 1)
                pass_on((tile + TILES - 1) % TILES, tile > 0 ? step : step - 1, tile > 0 || step > 0);
            const u32 x = *(const u32*)(memory + WEIGHTS + (tile * PAIRS + pair) * 4);
            look(mine, (const int*)(memory + COSTS) + (tile * 2 + old) * BUFFER, x, best);
            if (TILES == 1)
                pass_on(tile, step, true);
        }
    }
    if (TILES > 1)
        pass_on(TILES - 1, steps - 1, true);
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
    int state = cheapest([&](int s) { return cost_of(costs[at(s)]); });
    for (int step = 2 * AROUND - 1; step >= AROUND; step--)
        state = ((state << BITS) | memory[survivors_of(tile) + step * STATES + state]) & (STATES - 1);
    return state;
}

// The state in which the best path goes from one cluster's pairs to the other's; by one warp of both. `meeting` has room for the costs that
// both send, int [2, STATES], by the numbers that the states have forward.
__device__ __forceinline__ int meeting_state(const u8* memory, int tile, int* meeting, int end)
{
    const int* costs = (const int*)(memory + COSTS) + tile * 2 * BUFFER;
    const auto own = [&](int s) { return cost_of(costs[at(end ? reversed_state(s) : s)]); };
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
    // Sets of threads, each with SIDE states of its own, through all blocks.
    const int number = (rank * THREADS + threadIdx.x) / SHARE, in_warp = number % SETS, first_number = number - in_warp;
    mine.share = threadIdx.x % SHARE;
    mine.group = number % GROUPS;
    const int lowest = number / GROUPS * SIDE * GROUPS + mine.group;
    mine.first = GROUPS == 1 ? lowest : (first_number / GROUPS * SIDE + in_warp % 4) * GROUPS + first_number % GROUPS + in_warp / 4 * 4;
    mine.direction = end ? -1 : 1;
#pragma unroll
    for (int four = 0; four < EACH / 4; four++)
    {
        const int side = four / (LOWS / 4), low = four % (LOWS / 4) * 4 * SHARE + mine.share * 4;
        const int window = end * 65536 + (lowest + side * GROUPS) * BRANCHES + low;
        const uint2 pairs = *(const uint2*)(levels + 2 * window);
        mine.levels[2 * four] = pairs.x;
        mine.levels[2 * four + 1] = pairs.y;
        mine.part[4 * four] = 2 * PLACES * (square(pairs.x, 0) + square(pairs.x, 1));
        mine.part[4 * four + 1] = 2 * PLACES * (square(pairs.x, 2) + square(pairs.x, 3));
        mine.part[4 * four + 2] = 2 * PLACES * (square(pairs.y, 0) + square(pairs.y, 1));
        mine.part[4 * four + 3] = 2 * PLACES * (square(pairs.y, 2) + square(pairs.y, 3));
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
        const u32 x0 = tile < tiles ? (u32)(-PLACES * pair[0]) : 0, x1 = tile < tiles ? (u32)(-PLACES * pair[1]) : 0;
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
            put(true, address_in(mine.here, threadIdx.x % 32) + BOUNDARIES + traced * 4, state);
    }
    meet();
    for (int index = threadIdx.x; index < TILES * STATES; index += THREADS)
    {
        const int state = index % STATES, boundary = ((const int*)(memory + BOUNDARIES))[index / STATES];
        const int cost = state == boundary ? 0 : FORBIDDEN;
        ((int*)(memory + COSTS))[index / STATES * 2 * BUFFER + at(state)] = cost * PLACES + place(state & (BRANCHES - 1));
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
