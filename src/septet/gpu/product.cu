// Products of a few tokens with trellis weights, and the weights' levels: compiled by NVRTC, see compiler.py.
//
// One warp takes "units" of 64 outputs x 64 inputs (16 tiles). Lane 4g + t decodes outputs 8g .. 8g+7 of tiles 4t .. 4t+3: these are
// the A fragments of mma.m16n8k32 (int8) or m16n8k16 (float16), so that no weight moves between lanes and tokens cost next to nothing.
// Levels come from a table in shared memory that holds every level once per lane: 32 look-ups, 32 banks, no conflicts.
// A warp walks over consecutive units and leaves one partial sum per row of tiles it has touched, in a slot of its own; `finish` in
// activations.cu adds them in order. No atomics: the same bits every time.
//
// Macros: BITS 6..8, MULTIPLIER, LEVELS (128 numbers), FLOAT 0|1, TILES_OF_8 tokens 1|2, WARPS, BLOCKS_PER_SM, HASH 0|1|2.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int kWords = 2 * BITS;          // of a lane in a unit
constexpr int kUnitWords = 32 * kWords;
constexpr int kTableWords = 256 * 64;     // [index byte][level in bits 0.. | level one place up][lane]
__constant__ signed char kLevels[128] = {LEVELS};

extern __shared__ __align__(16) u32 table[];

__device__ __forceinline__ u16 half_of(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// The unused top bit of an index byte is looked up like the rest: entries 128 .. 255 repeat 0 .. 127.
__device__ __forceinline__ void fill_table() {
    for (int i = threadIdx.x; i < kTableWords / 4; i += blockDim.x) {
        const int level = kLevels[(i >> 4) & 127];
        u32 word = FLOAT ? (u32)half_of((float)level) : (u32)level & 0xFF;
        if (i & 8) word <<= FLOAT ? 16 : 8;
        ((uint4*)table)[i] = make_uint4(word, word, word, word);
    }
}

__device__ __forceinline__ uint4 stream_4(const u32* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ uint2 stream_2(const u32* p) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// The words of a lane: groups of four for all lanes, then what is left in a group of two.
__device__ __forceinline__ void load_unit(u32 (&w)[kWords], const u32* unit, int lane) {
    #pragma unroll
    for (int v = 0; v < kWords / 4; v++) {
        const uint4 four = stream_4(unit + v * 128 + lane * 4);
        w[4 * v] = four.x; w[4 * v + 1] = four.y; w[4 * v + 2] = four.z; w[4 * v + 3] = four.w;
    }
    if (kWords % 4) {
        const uint2 two = stream_2(unit + kWords / 4 * 128 + lane * 2);
        w[kWords - 2] = two.x; w[kWords - 1] = two.y;
    }
}

__device__ __forceinline__ u32 multiply_add(u32 a, u32 b, u32 c) {
    u32 d;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// 16 bits from bit `offset` of a stream of words, and rubbish above them.
__device__ __forceinline__ u32 raw_window(const u32* a, int offset) {
    const int i = offset >> 5, s = offset & 31;
    if (s == 0) return a[i];
    if (s <= 16) return a[i] >> s;
    return __funnelshift_r(a[i], a[i + 1], s);
}

struct Lookup {
    u32 lane4;   // 4 * lane
    u32 two16;   // 65536, from a kernel argument: a multiplication by it runs beside shifts and logic, which are scarce

    // Levels of one pair, the first in the low place and the second one place up.
    __device__ __forceinline__ void pair(const u32* a, int p, u32& first, u32& second) const {
        const int offset = BITS * p, s = offset & 31;
        const u32 raw = raw_window(a, offset);
        const bool high = HASH == 1 || (HASH == 2 && (p & 1)) || s == 0;
        u32 h, select_first, select_second;
        if (high) {
            h = __umulhi(raw * two16, MULTIPLIER);
            select_first = 0x5504; select_second = 0x5514;
        } else {
            h = (s == 16 ? raw : raw & 0xFFFF) * MULTIPLIER;
            select_first = 0x5524; select_second = 0x5534;
        }
        first = *(const u32*)((const char*)table + __byte_perm(h, lane4, select_first));
        second = *(const u32*)((const char*)table + 128 + __byte_perm(h, lane4, select_second));
    }

    // Four int8 levels of output `o`.
    __device__ __forceinline__ u32 four(const u32* a, int o) const {
        u32 l0, l1, l2, l3;
        pair(a, 2 * o, l0, l1);
        pair(a, 2 * o + 1, l2, l3);
        return multiply_add(l2, two16, l0) | multiply_add(l3, two16, l1);
    }

    // Two float16 levels of pair `p`.
    __device__ __forceinline__ u32 two(const u32* a, int p) const {
        u32 l0, l1;
        pair(a, p, l0, l1);
        return l0 | l1;
    }
};

// The streams of two neighbouring tiles, each 16*BITS bits and the beginning of the next lane's, which in lane 28+t is lane t's: a tile
// bites its tail.
__device__ __forceinline__ void chunks(const u32* w, int lane, u32 (&a)[5], u32 (&b)[5]) {
    constexpr int whole = BITS / 2, second = BITS == 7 ? 4 : whole;
    #pragma unroll
    for (int i = 0; i < whole; i++) { a[i] = w[i]; b[i] = w[second + i]; }
    const u32 next = __shfl_sync(~0u, __byte_perm(a[0], b[0], 0x5410), (lane + 4) & 31);
    a[whole] = BITS == 7 ? __byte_perm(w[3], next, 0x5410) : next;
    b[whole] = BITS == 7 ? __byte_perm(w[3], next, 0x7632) : next >> 16;
}

struct Sums {
#if FLOAT
    float of[TILES_OF_8][4][4];
#else
    int of[TILES_OF_8][4][4];
#endif
    __device__ __forceinline__ void clear() {
        #pragma unroll
        for (int n = 0; n < TILES_OF_8; n++)
            #pragma unroll
            for (int j = 0; j < 4; j++)
                #pragma unroll
                for (int i = 0; i < 4; i++) of[n][j][i] = 0;
    }
};

#if FLOAT
constexpr int kXWords = 8;   // 16 float16 of a lane; twice, since an activation is the sum of two float16
constexpr int kXParts = 2;

__device__ __forceinline__ void multiply(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
constexpr int kXWords = 4;   // 16 int8 of a lane
constexpr int kXParts = 1;

__device__ __forceinline__ void multiply(int (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#endif

typedef u32 Inputs[TILES_OF_8][kXParts][kXWords];

// Activations of a unit: [part][token][64 * units]; columns without a token are zero.
__device__ __forceinline__ void load_inputs(Inputs& x, const u32* inputs, int unit, int units, int tokens, int lane) {
    const int g = lane >> 2, t = lane & 3;
    #pragma unroll
    for (int n = 0; n < TILES_OF_8; n++)
        #pragma unroll
        for (int part = 0; part < kXParts; part++)
            #pragma unroll
            for (int v = 0; v < kXWords / 4; v++) {
                uint4 four = make_uint4(0, 0, 0, 0);
                const size_t row = (size_t)(part * tokens + 8 * n + g) * units + unit;
                if (8 * n + g < tokens) four = *(const uint4*)(inputs + (row * 4 + t) * kXWords + 4 * v);
                u32* to = x[n][part] + 4 * v;
                to[0] = four.x; to[1] = four.y; to[2] = four.z; to[3] = four.w;
            }
}

__device__ __forceinline__ void multiply_unit(Sums& sums, const u32 (&w)[kWords], const Inputs& x, const Lookup& lookup, int lane) {
    #pragma unroll
    for (int q = 0; q < 2; q++) {
        u32 a[5], b[5];
        chunks(w + BITS * q, lane, a, b);
#if FLOAT
        #pragma unroll
        for (int half = 0; half < 2; half++) {
            const u32* stream = half ? b : a;
            const int c = 2 * q + half;
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 e[4];
                #pragma unroll
                for (int i = 0; i < 4; i++) e[i] = lookup.two(stream, 4 * j + i);
                #pragma unroll
                for (int n = 0; n < TILES_OF_8; n++)
                    #pragma unroll
                    for (int part = 0; part < kXParts; part++)
                        multiply(sums.of[n][j], e[0], e[2], e[1], e[3], x[n][part][2 * c], x[n][part][2 * c + 1]);
            }
        }
#else
        #pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 e0 = lookup.four(a, 2 * j), e1 = lookup.four(a, 2 * j + 1), e2 = lookup.four(b, 2 * j), e3 = lookup.four(b, 2 * j + 1);
            #pragma unroll
            for (int n = 0; n < TILES_OF_8; n++) multiply(sums.of[n][j], e0, e1, e2, e3, x[n][0][2 * q], x[n][0][2 * q + 1]);
        }
#endif
    }
}

// Sums of a segment of inputs, times its scale, onto the sums of the row.
__device__ __forceinline__ void scale_segment(float (&total)[TILES_OF_8][4][4], Sums& sums, const float* scales, int segment, int segments, int tokens, int lane) {
    #pragma unroll
    for (int n = 0; n < TILES_OF_8; n++)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = 8 * n + 2 * (lane & 3) + i;
            const float scale = token < tokens ? scales[token * segments + segment] : 0.f;
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                total[n][j][i] = __fadd_rn(total[n][j][i], __fmul_rn(scale, (float)sums.of[n][j][i]));
                total[n][j][i + 2] = __fadd_rn(total[n][j][i + 2], __fmul_rn(scale, (float)sums.of[n][j][i + 2]));
            }
        }
    sums.clear();
}

// One slot is [tokens][64 outputs].
template <class T>
__device__ __forceinline__ void store_slot(u32* slot, const T (&total)[TILES_OF_8][4][4], int tokens, int lane) {
    const int g = lane >> 2, t = lane & 3;
    #pragma unroll
    for (int n = 0; n < TILES_OF_8; n++)
        #pragma unroll
        for (int i = 0; i < 2; i++) {
            const int token = 8 * n + 2 * t + i;
            if (token >= tokens) continue;
            uint4* to = (uint4*)(slot + token * 64 + 8 * g);
            #pragma unroll
            for (int v = 0; v < 2; v++) {
                const T four[4] = {total[n][2 * v][i], total[n][2 * v][i + 2], total[n][2 * v + 1][i], total[n][2 * v + 1][i + 2]};
                to[v] = *(const uint4*)four;
            }
        }
}

// Partial sums of `rows` rows of 64 outputs; a segment of inputs with one scale has 2^segment_shift units,
// or segment_shift is -1: one scale per token, which `finish` applies.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
product(const u32* __restrict__ weights, const u32* __restrict__ inputs, const float* __restrict__ scales, u32* __restrict__ slots,
        int rows, int units, int tokens, int workers, int segment_shift, u32 two16) {
    const int lane = threadIdx.x & 31, worker = blockIdx.x * WARPS + (threadIdx.x >> 5);
    const u64 all = (u64)rows * units;
    u64 at = all * worker / workers;
    const u64 end = worker < workers ? all * (worker + 1) / workers : at;
    u32 w[kWords], next[kWords];
    if (at < end) load_unit(w, weights + at * kUnitWords, lane);
    fill_table();
    __syncthreads();
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (at >= end) return;
    const Lookup lookup = {4u * lane, two16};
    int row = at / units, unit = at % units;
    const bool segmented = segment_shift >= 0;
    const int segment_mask = segmented ? (1 << segment_shift) - 1 : 0, segments = segmented ? units + segment_mask >> segment_shift : 1;
    Sums sums;
    sums.clear();
    float total[TILES_OF_8][4][4] = {};
    for (; at < end; at++) {
        Inputs x;
        load_inputs(x, inputs, unit, units, tokens, lane);
        if (at + 1 < end) load_unit(next, weights + (at + 1) * kUnitWords, lane);
        multiply_unit(sums, w, x, lookup, lane);
        const bool last = unit + 1 == units || at + 1 == end;
        if (segmented && (last || (unit + 1 & segment_mask) == 0)) scale_segment(total, sums, scales, unit >> segment_shift, segments, tokens, lane);
        if (last) {
            u32* slot = slots + (size_t)(worker + row) * tokens * 64;
            if (segmented) {
                store_slot(slot, total, tokens, lane);
                #pragma unroll
                for (int i = 0; i < TILES_OF_8 * 16; i++) (&total[0][0][0])[i] = 0;
            } else {
                store_slot(slot, sums.of, tokens, lane);
                sums.clear();
            }
        }
        if (++unit == units) { unit = 0; row++; }
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
}

#if !FLOAT
// Levels of rows [first_row, first_row + rows) of tiles: int8 [rows * 64][units * 64].
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS_PER_SM)
levels(const u32* __restrict__ weights, uint4* __restrict__ to, int rows, int units, u32 two16) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int workers = gridDim.x * WARPS;
    fill_table();
    __syncthreads();
    const Lookup lookup = {4u * lane, two16};
    for (int at = blockIdx.x * WARPS + (threadIdx.x >> 5); at < rows * units; at += workers) {
        u32 w[kWords], a[5], b[5], c[5], d[5];
        load_unit(w, weights + (size_t)at * kUnitWords, lane);
        chunks(w, lane, a, b);
        chunks(w + BITS, lane, c, d);
        const int row = at / units, unit = at % units;
        #pragma unroll
        for (int o = 0; o < 8; o++)
            to[(((size_t)row * 64 + 8 * g + o) * units + unit) * 4 + t] = make_uint4(lookup.four(a, o), lookup.four(b, o), lookup.four(c, o), lookup.four(d, o));
    }
}
#endif
