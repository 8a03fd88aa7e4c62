// Products of many tokens with decoded levels on Hopper's tensor cores, and the rotation of the outputs. Follows values.cu; sm_90a.
//
// A block makes 128 tokens x 128 outputs. One warp brings 128 bytes of the inputs of each at a time into a ring of shared memory; two
// warpgroups multiply, 64 tokens each. Two blocks are a cluster: they have the same tokens, of which each brings half for both, and
// together the 256 outputs of a Hadamard block. Sums of a segment of inputs are int32; times their scale they go onto float32 sums in
// ascending order, by one fused multiply-add each, where the reference rounds the product and then the sum. With one scale per token
// there is one segment, and results have the reference's bits. Float activations are 16-bit integers in two rows of int8, 8 tokens' upper
// bytes and then their lower ones, which are a lane's two rows: 64 tokens are 128 rows.
// While sums of a segment are scaled, the tensor cores are at the next: there are two sets of them.
//
// Inputs may be cut into several launches: `carry_in` and `carry_out` hold the sums between them.
//
// Macros: MODE 0 int8 with segments, 1 int8 with one scale per token, 2 int16 with segments; STAGES of the ring; DTYPE of the result.

struct __align__(64) TensorMap {
    u64 words[16];
};

struct DenseArguments {
    TensorMap tokens_map;               // bytes, 128 a row, 64 rows at a time, swizzled
    const i8* levels;                   // in the order of levels.cu
    const float* scales;                // [tokens][scale_columns], from the first segment of this launch
    const u16* output_scale;
    Value* y;                           // [tokens][y_columns], unless there is `carry_out`
    const u32* carry_in;                // [tokens][carry_columns] or null
    u32* carry_out;
    int tokens, outputs, steps, first_step, segment_steps, scale_columns, y_columns, carry_columns, output_block;
    float normal;
};

constexpr int kTileRows = 128, kTileOutputs = 128, kStep = 128, kConsumerWarps = 8;
constexpr int kLaneTokens = MODE == 2 ? 1 : 2, kTileTokens = 64 * kLaneTokens, kSums = 32 * kLaneTokens;
constexpr u32 kLevelBytes = kTileOutputs * kStep, kStageBytes = kTileRows * kStep + kLevelBytes, kBarriersAt = STAGES * kStageBytes;
// Of floats that are exchanged: the rows of a warp, and those of a warpgroup, which are the tokens that a block finishes.
constexpr int kPitch = kTileOutputs + 8, kWarpRows = 8 * kLaneTokens;
constexpr u32 kWarpBytes = kWarpRows * kPitch * 4, kGroupBytes = 4 * kWarpBytes;
static_assert(3 * kGroupBytes <= kBarriersAt, "what the blocks exchange takes the place of the ring");
extern __shared__ __align__(1024) unsigned char ring[];

#define ONE(i) "+r"(acc[i])
#define EIGHT(i) ONE(i), ONE(i + 1), ONE(i + 2), ONE(i + 3), ONE(i + 4), ONE(i + 5), ONE(i + 6), ONE(i + 7)

// acc = a * b, plus acc if `add`; see `Place` for what a lane has.
__device__ __forceinline__ void multiply(int (&acc)[64], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
        " %64, %65, add;\n}\n"
        : EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56) : "l"(a), "l"(b), "r"(add));
}

__device__ __forceinline__ void hold(int (&acc)[64]) {
    #pragma unroll
    for (int i = 0; i < 64; i++) asm volatile("" : ONE(i) :: "memory");
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory"); }

// Matrices in shared memory, 128 and 64 bytes a row, 16-byte pieces swizzled over 8 rows.
__device__ __forceinline__ u64 tokens_at(u32 address) { return (address & 0x3FFFF) >> 4 | 1ull << 16 | 64ull << 32 | 1ull << 62; }
__device__ __forceinline__ u64 levels_at(u32 address) { return (address & 0x3FFFF) >> 4 | 1ull << 16 | 32ull << 32 | 2ull << 62; }

__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred done;\nmbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\nselp.u32 %0, 1, 0, done;\n}\n"
            : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

__device__ __forceinline__ u32 in_block(u32 address, u32 rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ void arrive_in_cluster() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_cluster() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
__device__ __forceinline__ void line_up_cluster() { arrive_in_cluster(), wait_for_cluster(); }

// Where a role is in the ring.
struct Turn {
    int slot;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++slot == STAGES) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// Barriers of the ring: a stage is full when its bytes are here, empty when 8 warps of both blocks are done with it.
struct Ring {
    u32 at;
    __device__ __forceinline__ u32 stage(int slot) const { return at + slot * kStageBytes; }
    __device__ __forceinline__ u32 full(int slot) const { return at + kBarriersAt + 16 * slot; }
    __device__ __forceinline__ u32 empty(int slot) const { return full(slot) + 8; }
    __device__ __forceinline__ u32 exchanged() const { return full(STAGES); }

    __device__ __forceinline__ void prepare() const {
        for (int slot = 0; slot < STAGES; slot++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(full(slot)));
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty(slot)), "n"(2 * kConsumerWarps));
        }
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(exchanged()), "n"(1 + kConsumerWarps / 2));
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(exchanged()), "r"(kGroupBytes) : "memory");
    }

    // By a whole warp; `there` is this ring in the own block (lane 0) or in the other. A release at cluster scope would wait for memory,
    // for a microsecond, and there is nothing to pass on: the tensor cores have read what they read.
    __device__ __forceinline__ void release(int slot, u32 there, int lane) const {
        if (lane < 2) asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" :: "r"(there + kBarriersAt + 16 * slot + 8) : "memory");
    }
};

__device__ __forceinline__ void bring(const DenseArguments& d, const Ring& ring, u32 rank, int row) {
    const u64 tokens_map = (u64)&d.tokens_map;
    const i8* levels = d.levels + (size_t)blockIdx.x * d.steps * kLevelBytes;
    const unsigned short both = 3;
    u64 first;   // levels are the first that the L2 gives up once they were read
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(first));
    Turn turn = {0, 1};
    for (int step = 0; step < d.steps; step++, turn.next()) {
        const u32 full = ring.full(turn.slot), stage = ring.stage(turn.slot);
        wait_for(ring.empty(turn.slot), turn.parity);
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(full), "r"(kStageBytes) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
            "[%0], [%1, {%2, %3}], [%4], %5;"
            :: "r"(stage + rank * 64 * kStep), "l"(tokens_map), "r"((d.first_step + step) * kStep), "r"(row + (int)rank * 64), "r"(full),
                "h"(both)
            : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
            :: "r"(stage + kTileRows * kStep), "l"(levels + (size_t)step * kLevelBytes), "r"(kLevelBytes), "r"(full), "l"(first)
            : "memory");
    }
}

// What a lane has: acc[4 * j + 2 * i + c] is row 16 * (warp % 4) + lane / 4 + 8 * i of its warpgroup's 64, and column 8 * j + 2 * (lane %
// 4) + c, which levels.cu made output 64 * (j / 8) + 16 * (lane % 4) + 8 * c + j % 8: twice 16 outputs in a row. In sums of tokens
// [at(j, i, c)], i is 0 alone where two rows are a token.
struct Place {
    int token, output;   // of the first sum, in the launch

    static __device__ __forceinline__ int at(int j, int i, int c) { return 32 * i + 16 * (j >> 3) + 8 * c + (j & 7); }

    // Whether sums 4 * v .. 4 * v + 3 are wanted, and where they are in `carry`.
    __device__ __forceinline__ bool inside(const DenseArguments& d, int v) const {
        return token + v / 8 * 8 < d.tokens && output + v / 4 % 2 * 64 + v % 4 * 4 < d.outputs;
    }
    __device__ __forceinline__ size_t place(const DenseArguments& d, int v) const {
        return (size_t)(token + v / 8 * 8) * d.carry_columns + output + v / 4 % 2 * 64 + v % 4 * 4;
    }

    template <class T>
    __device__ __forceinline__ void load(const DenseArguments& d, T (&sums)[kSums]) const {
        #pragma unroll
        for (int v = 0; v < kSums / 4; v++) {
            const uint4 four = inside(d, v) ? *(const uint4*)(d.carry_in + place(d, v)) : make_uint4(0, 0, 0, 0);
            *(u32*)&sums[4 * v] = four.x;
            *(u32*)&sums[4 * v + 1] = four.y;
            *(u32*)&sums[4 * v + 2] = four.z;
            *(u32*)&sums[4 * v + 3] = four.w;
        }
    }

    template <class T>
    __device__ __forceinline__ void store(const DenseArguments& d, const T (&sums)[kSums]) const {
        #pragma unroll
        for (int v = 0; v < kSums / 4; v++)
            if (inside(d, v))
                *(uint4*)(d.carry_out + place(d, v)) = make_uint4(*(const u32*)&sums[4 * v], *(const u32*)&sums[4 * v + 1],
                    *(const u32*)&sums[4 * v + 2], *(const u32*)&sums[4 * v + 3]);
    }

    __device__ __forceinline__ void load_scales(const DenseArguments& d, int segment, float (&scale)[kLaneTokens]) const {
        #pragma unroll
        for (int i = 0; i < kLaneTokens; i++)
            scale[i] = token + 8 * i < d.tokens ? d.scales[(size_t)(token + 8 * i) * d.scale_columns + segment] : 0.f;
    }
};

// Sums of a segment, times its scale, onto those of the tokens.
__device__ __forceinline__ void scale_segment(float (&sums)[kSums], const int (&acc)[64], const float (&scale)[kLaneTokens]) {
    #pragma unroll
    for (int j = 0; j < 16; j++)
        #pragma unroll
        for (int i = 0; i < kLaneTokens; i++)
            #pragma unroll
            for (int c = 0; c < 2; c++) {
                const int sum = MODE == 2 ? 256 * acc[4 * j + c] + acc[4 * j + 2 + c] : acc[4 * j + 2 * i + c];
                float& to = sums[Place::at(j, i, c)];
                to = __fmaf_rn(scale[i], (float)sum, to);
            }
}

// What a warpgroup needs to multiply. Two steps are on their way when it comes back from one.
struct Consumer {
    Ring ring;
    u32 there;   // the ring in the own block (lane 0) or in the other (lane 1)
    int group, lane, owed;   // releases that somebody waits for: not those of the last stages, who may be gone when they come
    Turn turn, done;
    int pending;

    __device__ __forceinline__ void release() {
        if (owed-- > 0) ring.release(done.slot, there, lane);
        done.next();
    }

    // Begins the sums of some steps; those of two steps before the last are complete then.
    __device__ __forceinline__ void begin_segment(int (&acc)[64], int steps) {
        for (int step = 0; step < steps; step++) {
            const u32 stage = ring.stage(turn.slot);
            wait_for(ring.full(turn.slot), turn.parity);
            const u64 a = tokens_at(stage + group * 64 * kStep), b = levels_at(stage + kTileRows * kStep);
            begin_products();
            #pragma unroll
            for (int k = 0; k < 4; k++) multiply(acc, a + 2 * k, b + k / 2 * (kLevelBytes / 32) + k % 2 * 2, step || k);
            commit_products();
            turn.next();
            wait_for_products<2>();
            if (--pending < 0) release();
        }
    }
};

// Butterflies of strides 1 .. 64 over the outputs: all, or those within blocks.
template <bool kAll>
__device__ __forceinline__ void rotate_outputs(float (&v)[kSums], int block, int lane) {
    #pragma unroll
    for (int h = 1; h < 16; h *= 2)
        if (kAll || block > h)
            #pragma unroll
            for (int i = 0; i < kSums; i++)
                if (!(i & h)) add_and_subtract(v[i], v[i + h]);
    #pragma unroll
    for (int h = 1; h < 4; h *= 2)
        if (kAll || block > 16 * h) {
            // mine * -1 + other rounds like other - mine
            const float sign = lane & h ? -1.f : 1.f;
            #pragma unroll
            for (int i = 0; i < kSums; i++) v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(~0u, v[i], h));
        }
    if (kAll)
        #pragma unroll
        for (int i = 0; i < kSums; i++)
            if (!(i & 16)) add_and_subtract(v[i], v[i + 16]);
}

// Gives the sums of a warp to the block that finishes its tokens: there the sums of both blocks lie one after the other, here behind them
// what is on its way. Of lanes 2 and 3 of four, neighbouring pieces of 16 bytes change places, so that lanes beside each other write to
// other banks; `finish` knows.
__device__ __forceinline__ void give(const float (&v)[kSums], const Ring& ring, u32 rank, int group, int warp, int lane) {
    const bool mine = group == rank;
    const u32 rows = (warp & 3) * kWarpBytes, from = ring.at + (mine ? rank : 2) * kGroupBytes + rows;
    const u32 to = from + 4 * (lane / 4 * kPitch + 16 * (lane & 3)), swap = (lane & 2) * 8;
    #pragma unroll
    for (int f = 0; f < kSums / 4; f++)
        asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" :: "r"(to + 4 * (f / 8 * 8 * kPitch + f / 4 % 2 * 64 + f % 4 * 4) +
            (f % 2 ? -swap : swap)), "f"(v[4 * f]), "f"(v[4 * f + 1]), "f"(v[4 * f + 2]), "f"(v[4 * f + 3]) : "memory");
    if (!mine) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane) return;
    if (mine) asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(ring.exchanged()) : "memory");
    else
        asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
            :: "r"(in_block(ring.at + rank * kGroupBytes + rows, group)), "r"(from), "r"(kWarpBytes), "r"(in_block(ring.exchanged(), group))
            : "memory");
}

// The last butterfly, the scales, and the result: half a tile's tokens x 256 outputs of a block, four and four outputs of a lane.
__device__ __forceinline__ void finish(const DenseArguments& d, const Ring& ring, const float* sums, int token, int output, int warp,
    int lane) {
    float factor[2][4];
    #pragma unroll
    for (int half = 0; half < 2; half++) {
        const int o = output + half * kTileOutputs + 4 * lane;
        __align__(8) u16 four[4] = {};
        if (o < d.outputs) *(uint2*)four = *(const uint2*)(d.output_scale + o);
        #pragma unroll
        for (int i = 0; i < 4; i++) factor[half][i] = of_half(four[i]);
    }
    wait_for(ring.exchanged(), 0);
    arrive_in_cluster();
    sums += 4 * (lane ^ lane >> 3 & 1);
    #pragma unroll 2
    for (int row = warp; row < kTileTokens / 2; row += kConsumerWarps) {
        const float4 low = *(const float4*)(sums + row * kPitch), high = *(const float4*)(sums + row * kPitch + kGroupBytes / 4);
        const float v[2][4] = {{low.x, low.y, low.z, low.w}, {high.x, high.y, high.z, high.w}};
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            __align__(16) Value four[4];
            #pragma unroll
            for (int i = 0; i < 4; i++) {
                const float sum = d.output_block <= kTileOutputs ? v[half][i] : __fadd_rn(v[0][i], half ? -v[1][i] : v[1][i]);
                four[i] = write(__fmul_rn(__fmul_rn(sum, d.normal), factor[half][i]));
            }
            const int o = output + half * kTileOutputs + 4 * lane;
            Value* to = d.y + (size_t)(token + row) * d.y_columns + o;
            if (o >= d.outputs || token + row >= d.tokens) continue;
            if (sizeof(Value) == 4) *(uint4*)to = *(const uint4*)four;
            else *(uint2*)to = *(const uint2*)four;
        }
    }
    // nobody may leave before the other block has what it was given
    wait_for_cluster();
}

// Blocks along x count outputs, along y tokens. The third warpgroup has one warp of work, and gives its registers to the others.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(32 * (kConsumerWarps + 4), 1)
dense(const __grid_constant__ DenseArguments d) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, group = warp >> 2;
    const u32 base = (u32)__cvta_generic_to_shared(ring), at = base + 1023 & ~1023u, rank = blockIdx.x & 1;
    const Ring stages = {at};
    const int token = blockIdx.y * kTileTokens, output = blockIdx.x * kTileOutputs;
    if (threadIdx.x == 0) stages.prepare();
    if (threadIdx.x == 32 * kConsumerWarps) asm volatile("prefetch.tensormap [%0];" :: "l"((u64)&d.tokens_map) : "memory");
    line_up_cluster();
    let_the_next_begin();
    wait_for_inputs();
    if (group == 2) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 32 * kConsumerWarps) bring(d, stages, rank, blockIdx.y * kTileRows);
        __syncwarp();
        line_up_cluster();
        if (!d.carry_out) line_up_cluster();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const Place place = {token + kLaneTokens * (32 * group + 8 * (warp & 3)) + lane / 4, output + 16 * (lane & 3)};
        float sums[kSums];
        Consumer consumer = {stages, in_block(at, rank ^ min(lane, 1)), group, lane, d.steps - STAGES, {0, 0}, {0, 0}, 2};
        float scale[kLaneTokens];
#if MODE == 1
        int acc[64], whole[64];
        place.load_scales(d, 0, scale);
        consumer.begin_segment(acc, d.steps);
        wait_for_products<0>();
        hold(acc);
        #pragma unroll
        for (int i = 0; i < 64; i++) whole[Place::at(i / 4, i / 2 % 2, i % 2)] = acc[i];
        if (d.carry_in) {
            int before[64];
            place.load(d, before);
            #pragma unroll
            for (int i = 0; i < 64; i++) whole[i] += before[i];
        }
        if (d.carry_out) place.store(d, whole);
        #pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = __fmul_rn(scale[i / 32], (float)whole[i]);
#else
        // while sums of one segment are scaled, the tensor cores are at the next
        int even[64], odd[64], left = d.steps, segment = 0;
        float of_odd[kLaneTokens];
        const auto begin = [&](int (&acc)[64], float (&scale)[kLaneTokens]) {
            const int steps = min(left, d.segment_steps);
            left -= steps;
            place.load_scales(d, segment++, scale);
            consumer.begin_segment(acc, steps);
            return steps;
        };
        const auto end = [&](int (&acc)[64], const float (&scale)[kLaneTokens]) { hold(acc), scale_segment(sums, acc, scale); };
        if (d.carry_in) place.load(d, sums);
        else
            #pragma unroll
            for (int i = 0; i < kSums; i++) sums[i] = 0.f;
        begin(even, scale);
        for (;;) {
            if (!left) {
                wait_for_products<0>();
                end(even, scale);
                break;
            }
            if (begin(odd, of_odd) == 1) wait_for_products<1>();
            end(even, scale);
            if (!left) {
                wait_for_products<0>();
                end(odd, of_odd);
                break;
            }
            if (begin(even, scale) == 1) wait_for_products<1>();
            end(odd, of_odd);
        }
        if (d.carry_out) place.store(d, sums);
#endif
        // nobody may leave, or write into a neighbour's ring, before all are done with theirs
        line_up_cluster();
        if (d.carry_out) return;
        if (d.output_block > kTileOutputs / 2) rotate_outputs<true>(sums, d.output_block, lane);
        else rotate_outputs<false>(sums, d.output_block, lane);
        give(sums, stages, rank, group, warp, lane);
        finish(d, stages, (const float*)(ring + (at - base)), token + kTileTokens / 2 * rank, output - rank * kTileOutputs, warp, lane);
    }
}
