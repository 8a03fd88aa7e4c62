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
// kept as PLACES * cost + place, and the place, of the window among those of a state that a thread looks at, comes out of the least sum:
// ties go to the lowest low bits.
//
// With w = s << BITS | low the new state is s = c * GROUPS + g, and the one before it g << BITS | low: costs are in rows, one for each g. A
// warp has states of one g, and SHARE neighbouring threads SIDE of them, so that each cost that a thread reads serves SIDE windows. These
// states, and what a thread reads at once, differ in the first two bits of low, in its row each: see `at`. So a warp sends words that are
// neighbours, without a shuffle. Costs go to all blocks, what a state's best low bits are to one block for each tile, which traces back.
//
// Nobody waits for a barrier between steps: most of a step would be its latency where a cluster has one tile. Each word of costs says
// itself whether it is there, by its sign: costs of even steps have TAG added, those of odd steps have it subtracted, which changes no
// decision. A warp waits until its own row is there, half of which rows are from its own block and there at once. Costs are in BUFFERS
// buffers in turn. Three are enough: a warp that sends costs after step n + 2 has seen a row of step n + 1, of which each word came from
// a warp that had seen a row of step n, together all rows, and who sent those had done with step n - 1. And three is odd, so the sign of
// what a word replaces is another.
//
// MIDDLE is subtracted from all metrics, then no cost of SEGMENT steps can be out of range, whatever the inputs: costs lose their least
// only between segments. Two steps lead from the cheapest state to any other, so costs are within FARTHEST for each step.
//
// With several tiles, what a thread has found of one it shuffles and sends while it looks at the next, since shuffles are waited for.
//
// What blocks and clusters say to each other is in exchange.cu, with all that C++ has no words for; where costs are in states.cu. Both come
// before this, and tests/emulated_gpu.h says the same as the first for a processor.
//
// Macros: BITS, PARTS (2), THREADS (256 or 512), SIDE (4), TILES, ENDS, AROUND (a multiple of 4), FORBIDDEN.

// Of the first four states of each side, how many metrics a thread computes while their costs are on their way: as many as it has registers
// for. With several tiles nobody waits.
constexpr int EARLY = TILES > 1 ? 0 : THREADS > 256 ? 2 : 4;

// The sum of the squares of levels, of those in the mask.
__device__ __forceinline__ int energy(u32 levels, u32 mask)
{
    return __dp4a((int)(levels & mask), (int)levels, 0);
}

// Levels of neighbouring lows.
struct alignas(2 * QUADS) Run
{
    u32 words[QUADS / 2];
};

struct Thread
{
    u32 levels[EACH / 2];
    int part[EACH];
    // `state` is the one of which it knows what its set finds, and says so if it `speaks`.
    int share, direction, state;
    bool speaks;
    // Among costs, in bytes: what it looks at, and what it waits for.
    u32 reads, awaits;
    // Addresses of memory: its own, the other block's, and both.
    u32 here, there, everywhere[PARTS];
};

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

// Whether the sign of one of them is not this, -1 or 0: less than 0.
__device__ __forceinline__ int strange(const int4& quad, int sign)
{
    return (quad.x ^ sign) | (quad.y ^ sign) | (quad.z ^ sign) | (quad.w ^ sign);
}

// Until the row of costs is there that a warp needs; each thread looks after a part of it.
__device__ __forceinline__ void wait_for(u32 row, int sign)
{
    int wrong;
    do
    {
        wrong = strange(load(row), sign);
        if (BRANCHES > 128)
            wrong |= strange(load(row + 512), sign);
    } while (__any_sync(0xffffffffu, wrong < 0));
    __syncwarp();
}

// What a pair costs with the window of this side and place, without the state before.
__device__ __forceinline__ int metric(const Thread& mine, u32 x, int side, int place)
{
    const int window = side * LOWS + place;
    return place & 1 ? dot_high(x, mine.levels[window / 2], mine.part[window]) : dot_low(x, mine.levels[window / 2], mine.part[window]);
}

// What a step finds of a tile: for each state of a thread the least cost and the low bits it comes from, of those that the thread looks at.
// The first EARLY metrics of each side are known.
__device__ __forceinline__ void look(const Thread& mine, u32 from, u32 x, const int (&early)[4][SIDE], int (&best)[SIDE])
{
#pragma unroll
    for (int side = 0; side < SIDE; side++)
        best[side] = 0x7fffffff;
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++)
    {
        const int4 four = load(from + mine.reads + quad * SHARE * 16);
        // An array: with choices by ?: the loop over tiles was too long to be unrolled, so that 448 tiles took 1.17 times as long.
        const int costs[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int side = 0; side < SIDE; side++)
            {
                const int more = quad == 0 && i < EARLY ? early[i][side] : metric(mine, x, side, i * QUADS + quad);
                best[side] = min(best[side], more + costs[i]);
            }
    }
}

// Steps of a segment, from `first_step` of the search that begins with pair `begin`; all costs have come when it returns.
template <bool survivors>
__device__ __forceinline__ void segment(const Thread& mine, u8* memory, int begin, int first_step, int steps)
{
    const int own_place = place(mine.state % BRANCHES), own = at(mine.state) * 4;
    int best[SIDE] = {};
    int now = 0, next = 1;
    const auto pass_on = [&](int tile, int step, int into, bool real) {
        int sides[SIDE];
        // The share comes between the first two bits of low and its last ones, and the tag goes.
#pragma unroll
        for (int side = 0; side < SIDE; side++)
            sides[side] = (int)((u32)best[side] * SHARE + mine.share * QUADS - (best[side] & (QUADS - 1)) * (SHARE - 1));
        const int least = least_of_sides(sides, mine.share);
        const int word = (least >> BITS) * PLACES + (own_place + (step & 1 ? TAG : -TAG));
        const u32 to = COSTS + (tile * BUFFERS + into) * STATES * 4 + own;
        send(mine.speaks && real, mine.there + to, word);
        keep(mine.speaks && real, mine.here + to, word);
        if (survivors)
        {
            const u32 tracer = tile % PARTS == 0 ? mine.everywhere[0] : mine.everywhere[1];
            send_byte(mine.speaks && real, tracer + survivors_of(tile) + (first_step + step) * STATES + mine.state, least & (BRANCHES - 1));
        }
    };
    // Of several tiles each is passed on with the next one's turn; before the first step there is none.
    for (int step = 0; step < steps; step++)
    {
        const int pair = (begin + mine.direction * (first_step + step)) & (PAIRS - 1);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
        {
            const u32 x = *(const u32*)(memory + WEIGHTS + (tile * PAIRS + pair) * 4);
            const u32 costs = mine.here + COSTS + (tile * BUFFERS + now) * STATES * 4;
            int early[4][SIDE];
#pragma unroll
            for (int i = 0; i < EARLY; i++)
#pragma unroll
                for (int side = 0; side < SIDE; side++)
                    early[i][side] = metric(mine, x, side, i * QUADS);
            wait_for(costs + mine.awaits, -(step & 1));
            if (TILES > 1)
                pass_on(tile > 0 ? tile - 1 : TILES - 1, tile > 0 ? step : step - 1, tile > 0 ? next : now, tile > 0 || step > 0);
            look(mine, costs, x, early, best);
            if (TILES == 1)
                pass_on(tile, step, next, true);
        }
        now = next;
        next = next == BUFFERS - 1 ? 0 : next + 1;
    }
    if (TILES > 1)
        pass_on(TILES - 1, steps - 1, now, true);
    meet();
}

// Before a segment: its first costs, and in the other buffers words whose sign is not that of what will come.
template <class Cost>
__device__ __forceinline__ void prepare(u8* memory, const Cost& cost)
{
    for (int index = threadIdx.x; index < TILES * STATES; index += THREADS)
    {
        const int tile = index / STATES, state = index % STATES;
        int* const words = (int*)(memory + COSTS) + tile * BUFFERS * STATES + at(state);
        words[0] = cost(tile, state) * PLACES + place(state % BRANCHES) + TAG;
        words[STATES] = 0;
        words[2 * STATES] = -1;
    }
    meet();
}

// A search from prepared costs on; returns how many steps its last segment had.
template <bool survivors>
__device__ __forceinline__ int search(const Thread& mine, u8* memory, int begin, int steps)
{
    const int each = min(steps, SEGMENT);
    segment<survivors>(mine, memory, begin, 0, each);
    for (int step = each; step < steps; step += each)
    {
        const auto cost = [&](int tile, int state) { return cost_of(costs_after(memory, tile, each)[at(state)]); };
        int* const leasts = (int*)(memory + LEASTS);
        for (int tile = threadIdx.x / 32; tile < TILES; tile += WARPS)
        {
            int least = 0x7fffffff;
            for (int state = threadIdx.x % 32; state < STATES; state += 32)
                least = min(least, cost(tile, state));
            leasts[tile] = __reduce_min_sync(0xffffffffu, least);
        }
        __syncthreads();
        prepare(memory, [&](int tile, int state) { return cost(tile, state) - leasts[tile]; });
        segment<survivors>(mine, memory, begin, step, each);
    }
    return each;
}

// fixed: [tiles, 256]. levels: [ENDS, 65536, 2], for ENDS = 2 forward and backward. windows: [tiles, 128]. meetings: for ENDS = 2 [tiles, 2,
// 2, STATES], all EMPTY before and after.
extern "C" __global__ void __cluster_dims__(PARTS, 1, 1) __launch_bounds__(THREADS, 1)
    encode(const short* fixed, const signed char* levels, int* windows, int* meetings, int tiles)
{
    extern __shared__ __align__(16) u8 memory[];
    const u32 rank = block_in_cluster();
    const int cluster = blockIdx.x / PARTS, end = cluster % ENDS, first = cluster / ENDS * TILES;

    Thread mine;
    // A set of SHARE threads has the SIDE states of one g that differ in the first two bits of their low; a warp has SETS of one g.
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int WARPS_EACH = WARPS / GROUPS;
    const int group = warp / WARPS_EACH, set = (rank * WARPS_EACH + warp % WARPS_EACH) * SETS + lane / SHARE;
    mine.share = lane % SHARE;
    const int lowest = set / (APART / GROUPS) * BRANCHES + set % (APART / GROUPS) * GROUPS + group;
    mine.state = lowest + mine.share / (SHARE / SIDE) * APART;
    mine.speaks = mine.share % (SHARE / SIDE) == 0;
    mine.reads = group * BRANCHES * 4 + mine.share * 16;
    mine.awaits = group * BRANCHES * 4 + lane % APART * 16;
    keep_known(mine.reads, mine.awaits, mine.share);
    mine.direction = end ? -1 : 1;
#pragma unroll
    for (int run = 0; run < SIDE * 4; run++)
    {
        const int window = end * 65536 + (lowest + run / 4 * APART) * BRANCHES + run % 4 * APART + mine.share * QUADS;
        const Run its = *(const Run*)(levels + 2 * window);
#pragma unroll
        for (int word = 0; word < QUADS / 2; word++)
        {
            mine.levels[run * QUADS / 2 + word] = its.words[word];
            mine.part[run * QUADS + 2 * word] = PLACES * (2 * energy(its.words[word], 0xffff) - MIDDLE);
            mine.part[run * QUADS + 2 * word + 1] = PLACES * (2 * energy(its.words[word], 0xffff0000) - MIDDLE);
        }
    }
    mine.here = address_of(memory);
#pragma unroll
    for (int block = 0; block < PARTS; block++)
        mine.everywhere[block] = address_in(mine.here, block);
    mine.there = address_in(mine.here, 1 - rank);
    // A gang of warps traces a tile back, in a block of its own as far as there are enough.
    const int gang = warp / GANG, traced = rank + gang * PARTS;
    const bool leads = warp % GANG == 0 && traced < TILES, real = traced < TILES && first + traced < tiles;
    int* const meeting = meetings + (long long)(first + traced) * 4 * STATES;

    follow();
    for (int index = threadIdx.x; index < TILES * PAIRS; index += THREADS)
    {
        const int tile = first + index / PAIRS;
        const short* pair = fixed + 2 * ((long long)tile * PAIRS + index % PAIRS);
        const u32 x0 = tile < tiles ? (u32)(-PLACES * pair[0]) : 0, x1 = tile < tiles ? (u32)(-PLACES * pair[1]) : 0;
        *(u32*)(memory + WEIGHTS + index * 4) = (x0 & 0xffff) | (x1 << 16);
    }
    if (threadIdx.x < TILES)
        ((int*)(memory + BOUNDARIES))[threadIdx.x] = UNKNOWN;
    prepare(memory, [](int, int) { return 0; });
    int steps = search<ENDS == 1>(mine, memory, end ? AROUND - 1 : PAIRS - AROUND, STEPS_AROUND);
    const int known = min(traced, TILES - 1);
    const int boundary = ENDS == 1 ? boundary_state(memory, known, steps) : meeting_state(memory, known, meeting, end, steps, real);
    if (leads && lane < PARTS)
        send(true, address_in(mine.here, lane) + BOUNDARIES + traced * 4, boundary);
    for (int tile = 0; tile < TILES; tile++)
        wait_for(mine.here + BOUNDARIES + tile * 4);
    const int* boundaries = (const int*)(memory + BOUNDARIES);
    prepare(memory, [&](int tile, int state) { return state == boundaries[tile] ? 0 : FORBIDDEN; });
    steps = search<true>(mine, memory, end ? PAIRS - 1 : 0, STEPS);
    int state = ENDS == 1 ? boundaries[known] : meeting_state(memory, known, meeting + 2 * STATES, end, steps, real);
    if (!real || !leads || lane != 0)
        return;
    for (int step = STEPS - 1; step >= 0; step--)
    {
        const int window = (state << BITS) | memory[survivors_of(traced) + step * STATES + state];
        const int pair = end ? PAIRS - 1 - step : step;
        windows[(long long)(first + traced) * PAIRS + pair] = end ? reversed_window(window) : window;
        state = window & (STATES - 1);
    }
}
