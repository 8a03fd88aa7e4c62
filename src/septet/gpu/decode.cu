// Decoding trellis weights on a GPU into operands of the tensor cores. Compiled by NVRTC in front of product.cu or layer.cu.
//
// One warp takes "units" of 64 outputs x 64 inputs (16 tiles). Lane 4g + t decodes outputs 8g .. 8g+7 of tiles 4t .. 4t+3: these are
// the A fragments of mma.m16n8k32 (int8) or m16n8k16 (float16), so that no weight moves between lanes and tokens cost next to nothing.
// Levels come from a table in shared memory that holds every level once per lane: 32 look-ups, 32 banks, no conflicts.
// Nothing is spent on joining levels: those of a weight at place p of four have a table of their own, where they stand p bytes up, and
// each place is multiplied by itself. Tensor cores have time for that; the integer units, which do all the rest, have none.
//
// Where shared memory is too small for four tables (PLACES 2 or 1), two pairs or all four are joined after all.
//
// Macros: BITS 6..8, MULTIPLIER, LEVELS (128 numbers), FLOAT 0|1, TILES_OF_8 tokens 1|2|4, WARPS, PLACES 1|2|4, TABLE_AT.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

constexpr int kWords = 2 * BITS;          // of a lane in a unit
constexpr int kUnitWords = 32 * kWords;
constexpr int kPlaces = FLOAT ? 2 : PLACES;   // with a table of their own
__constant__ signed char kLevels[128] = {LEVELS};

// Where the tables begin in shared memory. Addresses are put together from bytes and the rest of a division by 65536, a constant. What lies
// below is for the kernel; a launch asks for shared memory up to the end of the tables.
constexpr u32 kTableAt = TABLE_AT;
extern __shared__ __align__(16) u32 shared_memory[];

__device__ __forceinline__ u16 half_of(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Words are [place / 2][index byte][place % 2][lane]; with one place those of the second are left out. The unused top bit of an index byte
// is looked up like the rest: entries 128 .. 255 repeat 0 .. 127.
__device__ __forceinline__ void fill_table() {
    if (kPlaces == 1) {
        // a known number of turns: all levels are on their way at once
        constexpr int threads = 32 * WARPS;
        #pragma unroll
        for (int turn = 0; turn < (128 * 8 + threads - 1) / threads; turn++) {
            const int i = turn * threads + threadIdx.x, level = kLevels[i >> 3 & 127];
            u32 word;
            // or the compiler would load the level for each of four words
            asm volatile("prmt.b32 %0, %1, 0, 0x4440;" : "=r"(word) : "r"(level));
            #pragma unroll
            for (int copy = 0; copy < 2; copy++)
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};"
                    :: "r"(kTableAt + (i >> 3 & 127) * 256 + (i & 7) * 16 + copy * (1 << 15)), "r"(word) : "memory");
        }
        return;
    }
    for (int i = threadIdx.x; i < 128 * 16; i += blockDim.x) {
        const int level = kLevels[i >> 4];
        const u32 word = (FLOAT ? (u32)half_of((float)level) : (u32)level & 0xFF) << (i >> 3 & 1) * (FLOAT ? 16 : 8);
        #pragma unroll
        for (int copy = 0; copy < (kPlaces == 4 ? 4 : 2); copy++)
            asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(kTableAt + 16 * i + copy * (1 << 15)),
                "r"(word << copy / 2 * 16) : "memory");
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

// The words of a lane: groups of four for all lanes, then what is left in a group of two. Pointers are to the lane's first of each.
__device__ __forceinline__ void load_unit(u32 (&w)[kWords], const u32* fours, const u32* twos) {
    #pragma unroll
    for (int v = 0; v < kWords / 4; v++) {
        const uint4 four = stream_4(fours + v * 128);
        w[4 * v] = four.x; w[4 * v + 1] = four.y; w[4 * v + 2] = four.z; w[4 * v + 3] = four.w;
    }
    if (kWords % 4) {
        const uint2 two = stream_2(twos);
        w[kWords - 2] = two.x; w[kWords - 1] = two.y;
    }
}

__device__ __forceinline__ void bring_closer(const void* line) { asm volatile("prefetch.global.L2 [%0];" :: "l"(line)); }

// The share of a block that a warp takes: those of the warps on one of a multiprocessor's four schedulers lie side by side, so that no
// scheduler has more than one unit more than another.
__device__ __forceinline__ int worker_of(int warp) { return warp % 4 * (WARPS / 4) + warp / 4; }

// Bits `offset` .. `offset` + 31 of a stream of words; zeros instead of the upper ones that nobody asks for.
__device__ __forceinline__ u32 bits_from(const u32* a, int offset) {
    const int i = offset >> 5, s = offset & 31;
    if (s == 0) return a[i];
    return BITS != 7 && s <= 16 ? a[i] >> s : __funnelshift_r(a[i], a[i + 1], s);
}

// Window of pair `p` times the multiplier. Two operations cut 16 bits out of 32, but one is enough where the window ends with the
// word, or begins at bit 2, for a multiplier that can be divided by 4. With 7 bits, one shift brings pairs p and p + 2 there.
__device__ __forceinline__ u32 window_product(const u32* a, int p) {
    const int offset = BITS * p;
    if (BITS == 7 && p) {
        static_assert(BITS != 7 || MULTIPLIER % 4 == 0, "the multiplier of 7 bits");
        if (p % 4 == 1 || p % 4 == 2) return (bits_from(a, offset - 2) & 0x3FFFC) * (MULTIPLIER / 4);
        return (bits_from(a, offset - 16) >> 16) * MULTIPLIER;
    }
    if (BITS == 8 && (offset & 31) == 8) return __byte_perm(a[offset >> 5], 0, 0x4421) * MULTIPLIER;
    const u32 bits = bits_from(a, offset);
    return ((offset & 31) == 16 ? bits : bits & 0xFFFF) * MULTIPLIER;
}

// a + b on the multipliers, which have time for it.
__device__ __forceinline__ u32 add(u32 a, u32 b, u32 one) {
    u32 sum;
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(sum) : "r"(a), "r"(one), "r"(b));
    return sum;
}

// A word of the table, from an address in shared memory.
__device__ __forceinline__ u32 table_word(u32 address) {
    u32 word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address));
    return word;
}

// What `look_up` puts around an index byte to make an address: 4 * lane, and above it where the tables of places 0 and 2 begin.
__device__ __forceinline__ u32 address_parts(int lane) { return 4 * lane | kTableAt >> 16 << 8 | (kTableAt >> 16) + 1 << 16; }

struct Lookup {
    u32 parts;   // see address_parts
    u32 one;     // 1, from a kernel argument, so that the compiler does not know

    // Levels of pair `p` of a stream at two places, the first of which is `place`.
    __device__ __forceinline__ void pair(const u32* a, int p, int place, u32& first, u32& second) const {
        // bytes 2 and 3 of the product are the indices; an entry of the table is 256 bytes, a lane's word in it at 4 * lane
        const u32 h = window_product(a, p), at = place ? 0x7624 : 0x7524;
        first = table_word(__byte_perm(h, parts, at) + kTableAt % 65536);
        second = table_word(__byte_perm(h, parts, at + 0x10) + kTableAt % 65536 + (kPlaces == 1 ? 0 : 128));
    }

    // Two float16 levels of pair `p`.
    __device__ __forceinline__ u32 two(const u32* a, int p) const {
        u32 first, second;
        pair(a, p, 0, first, second);
        return add(first, second, one);
    }

    // The four int8 levels of an output.
    __device__ __forceinline__ u32 four(const u32* a, int output) const {
        u32 e[4];
        pair(a, 2 * output, 0, e[0], e[1]);
        pair(a, 2 * output + 1, kPlaces == 4 ? 2 : 0, e[2], e[3]);
        if (kPlaces == 1) return add(add(e[3], e[2], one << 8), add(e[1], e[0], one << 8), one << 16);
        return kPlaces == 4 ? add(e[0] | e[1] | e[2], e[3], one) : add(e[2] | e[3], e[0] | e[1], one << 16);
    }
};

constexpr int kTileWords = BITS / 2, kSecondTile = BITS == 7 ? 4 : kTileWords;   // whole words of a tile; where those of the second are

// The beginnings of the next lane's streams, which in lane 28+t is lane t's: a tile bites its tail.
__device__ __forceinline__ u32 beginnings(const u32* w, int lane) {
    return __shfl_sync(~0u, __byte_perm(w[0], w[kSecondTile], 0x5410), (lane + 4) & 31);
}

// The streams of two neighbouring tiles, each 16*BITS bits and the beginning of the next lane's.
__device__ __forceinline__ void chunks(const u32* w, u32 next, u32 (&a)[5], u32 (&b)[5]) {
    constexpr int whole = kTileWords;
    #pragma unroll
    for (int i = 0; i < whole; i++) { a[i] = w[i]; b[i] = w[kSecondTile + i]; }
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

// Activations of a unit, [part][token][64 * units], from the lane's first word of it; columns without a token are zero.
__device__ __forceinline__ void load_inputs(Inputs& x, const u32* from, int units, int tokens, int lane) {
    #pragma unroll
    for (int n = 0; n < TILES_OF_8; n++)
        #pragma unroll
        for (int part = 0; part < kXParts; part++)
            #pragma unroll
            for (int v = 0; v < kXWords / 4; v++) {
                uint4 four = make_uint4(0, 0, 0, 0);
                if (8 * n + (lane >> 2) < tokens)
                    four = *(const uint4*)(from + (size_t)(part * tokens + 8 * n) * units * 4 * kXWords + 4 * v);
                u32* to = x[n][part] + 4 * v;
                to[0] = four.x; to[1] = four.y; to[2] = four.z; to[3] = four.w;
            }
}

__device__ __forceinline__ void multiply_unit(Sums& sums, const u32 (&w)[kWords], const Inputs& x, const Lookup& lookup, int lane) {
    #pragma unroll
    for (int q = 0; q < 2; q++) {
        u32 a[5], b[5];
        chunks(w + BITS * q, beginnings(w + BITS * q, lane), a, b);
        #pragma unroll
        for (int j = 0; j < 4; j++) {
#if FLOAT
            // pairs 0 and 1 of outputs 2j and 2j+1, of one tile after the other
            #pragma unroll
            for (int i = 0; i < 2; i++) {
                const int c = 2 * (2 * q + i);
                u32 e[4];
                #pragma unroll
                for (int p = 0; p < 4; p++) e[p] = lookup.two(i ? b : a, 4 * j + p);
                #pragma unroll
                for (int n = 0; n < TILES_OF_8; n++)
                    #pragma unroll
                    for (int part = 0; part < kXParts; part++)
                        multiply(sums.of[n][j], e[0], e[2], e[1], e[3], x[n][part][c], x[n][part][c + 1]);
            }
#else
            const u32 e0 = lookup.four(a, 2 * j), e1 = lookup.four(a, 2 * j + 1), e2 = lookup.four(b, 2 * j),
                e3 = lookup.four(b, 2 * j + 1);
            #pragma unroll
            for (int n = 0; n < TILES_OF_8; n++) multiply(sums.of[n][j], e0, e1, e2, e3, x[n][0][2 * q], x[n][0][2 * q + 1]);
#endif
        }
    }
}

#if !FLOAT
// The tensor cores' operands of a unit.
typedef u32 Operands[2][4][4];
constexpr int kOperandBytes = 64 * 64;

// With `next`, the `beginnings` of both halves of the unit.
__device__ __forceinline__ void decode_unit(Operands& e, const u32 (&w)[kWords], const u32 (&next)[2], const Lookup& lookup) {
    #pragma unroll
    for (int q = 0; q < 2; q++) {
        u32 a[5], b[5];
        chunks(w + BITS * q, next[q], a, b);
        #pragma unroll
        for (int j = 0; j < 4; j++)
            #pragma unroll
            for (int i = 0; i < 4; i++) e[q][j][i] = lookup.four(i / 2 ? b : a, 2 * j + i % 2);
    }
}

__device__ __forceinline__ void decode_unit(Operands& e, const u32 (&w)[kWords], const Lookup& lookup, int lane) {
    const u32 next[2] = {beginnings(w, lane), beginnings(w + BITS, lane)};
    decode_unit(e, w, next, lookup);
}

__device__ __forceinline__ void multiply_operands(Sums& sums, const Operands& e, const uint4& x) {
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        multiply(sums.of[0][j], e[0][j][0], e[0][j][1], e[0][j][2], e[0][j][3], x.x, x.y);
        multiply(sums.of[0][j], e[1][j][0], e[1][j][1], e[1][j][2], e[1][j][3], x.z, x.w);
    }
}

// Operands of a lane in shared memory, four words at a time, which are `stride` bytes apart.
__device__ __forceinline__ void put_operands(u32 at, u32 stride, const Operands& e) {
    #pragma unroll
    for (int n = 0; n < 8; n++) {
        const u32 (&four)[4] = e[n / 4][n % 4];
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
            :: "r"(at + n * stride), "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3]) : "memory");
    }
}

__device__ __forceinline__ void get_operands(u32 at, u32 stride, Operands& e) {
    #pragma unroll
    for (int n = 0; n < 8; n++) {
        u32 (&four)[4] = e[n / 4][n % 4];
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3]) : "r"(at + n * stride) : "memory");
    }
}
#endif

// Sums of a segment of inputs, times its scale, onto the sums of the row.
__device__ __forceinline__ void scale_segment(float (&total)[TILES_OF_8][4][4], Sums& sums, const float* scales, int segment,
    int segments, int tokens, int lane) {
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
