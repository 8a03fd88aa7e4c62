// Units of layer.cu that are decoded before its inputs are there: where they wait, and how they are multiplied. Follows columns.cu.

// The tensor cores' operands of a unit.
typedef u32 Operands[2][4][4];

__device__ __forceinline__ void decode_unit(Operands& e, const u32 (&w)[kWords], const Lookup& lookup, int lane) {
    #pragma unroll
    for (int q = 0; q < 2; q++) {
        u32 a[5], b[5];
        chunks(w + BITS * q, lane, a, b);
        #pragma unroll
        for (int j = 0; j < 4; j++)
            #pragma unroll
            for (int i = 0; i < 4; i++) e[q][j][i] = lookup.four(i / 2 ? b : a, 2 * j + i % 2);
    }
}

__device__ __forceinline__ void multiply_operands(Sums& sums, const Operands& e, const uint4& x) {
    #pragma unroll
    for (int j = 0; j < 4; j++) {
        multiply(sums.of[0][j], e[0][j][0], e[0][j][1], e[0][j][2], e[0][j][3], x.x, x.y);
        multiply(sums.of[0][j], e[1][j][0], e[1][j][1], e[1][j][2], e[1][j][3], x.z, x.w);
    }
}

// Where a lane keeps operands of stored unit `i` of its warp's share `worker`, and how far four words are from the next: the last units of
// warps in the gaps of the table with one place, the others behind the table.
struct Store {
    u32 at, stride;

    __device__ __forceinline__ Store(int i, int worker, int lane) {
        const int place = (STORED - 1 - i) * WARPS + worker;
        const bool in_gap = place < kGaps;
        at = in_gap ? kTableAt + place * 2 * kOperandBytes + 128 + lane / 8 * 256 + lane % 8 * 16
                    : kOperandsAt + (place - kGaps) * kOperandBytes + lane * 16;
        stride = in_gap ? 4 * 256 : 4 * 128;
    }

    __device__ __forceinline__ void put(const Operands& e) const {
        #pragma unroll
        for (int n = 0; n < 8; n++) {
            const u32 (&four)[4] = e[n / 4][n % 4];
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
                :: "r"(at + n * stride), "r"(four[0]), "r"(four[1]), "r"(four[2]), "r"(four[3]) : "memory");
        }
    }

    __device__ __forceinline__ void get(Operands& e) const {
        #pragma unroll
        for (int n = 0; n < 8; n++) {
            u32 (&four)[4] = e[n / 4][n % 4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                : "=r"(four[0]), "=r"(four[1]), "=r"(four[2]), "=r"(four[3]) : "r"(at + n * stride) : "memory");
        }
    }
};

// The first units of a warp, decoded: STORED of them in shared memory, and one more in registers. `w` is then the next. Returns where their
// inputs are, counted in units: a byte for each of the first four.
__device__ __forceinline__ u32 decode_first(const LayerArguments& l, const Share& share, Walk walk, int left, u32 (&w)[kWords],
    Operands& ahead, const Lookup& lookup, const Memory& memory, int lane) {
    u32 places = 0;
    #pragma unroll 1
    for (int i = 0; i < min(STORED + 1, left); i++) {
        u32 next[kWords];
        places |= (u32)memory.place(walk.unit) << 8 * i;
        if (i + 1 < left) {
            walk.step(l, share);
            walk.load(next, lane);
        }
        decode_unit(ahead, w, lookup, lane);
        if (i < STORED) Store(i, worker_of(threadIdx.x / 32), lane).put(ahead);
        #pragma unroll
        for (int j = 0; j < kWords; j++) w[j] = next[j];
    }
    return places;
}

#if ALL
// The sums of each of a warp's units, `left` from the block's unit `begin` on, to shared memory. As many columns of the tensor cores are for
// tokens, and there is one; so each unit has a column of its own, and nothing is done between units.
__device__ __forceinline__ void multiply_all(const LayerArguments& l, int begin, int left, u32 places, const Operands& ahead,
    const Memory& memory, int lane) {
    const int g = lane >> 2, t = lane & 3, worker = worker_of(threadIdx.x >> 5);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (g < left) x = ((const uint4*)memory.values)[(places >> 8 * g & 0xFF) * 4 + t];
    const auto x_of = [&](int unit) { return make_uint4(g == unit ? x.x : 0, g == unit ? x.y : 0, g == unit ? x.z : 0, g == unit ? x.w : 0); };
    Sums sums;
    sums.clear();
    multiply_operands(sums, ahead, x_of(STORED));
    #pragma unroll
    for (int i = 0; i < STORED; i++) {
        Operands operands;
        Store(i, worker, lane).get(operands);
        multiply_operands(sums, operands, x_of(i));
    }
    #pragma unroll
    for (int i = 0; i < 2; i++) {
        const int unit = 2 * t + i;
        if (unit >= left) continue;
        const float scale = SEGMENTED ? memory.scales[(places >> 8 * unit & 0xFF) >> l.segment_shift] : 1.f;
        #pragma unroll
        for (int v = 0; v < 2; v++) {
            Sum four[4];
            #pragma unroll
            for (int n = 0; n < 4; n++) {
                const int sum = sums.of[0][2 * v + n / 2][i + n % 2 * 2];
                four[n] = SEGMENTED ? (Sum)__fmul_rn(scale, (float)sum) : (Sum)sum;
            }
            asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(unit_sums(begin + unit, 8 * g + 4 * v)), "r"(word_of(four[0])),
                "r"(word_of(four[1])), "r"(word_of(four[2])), "r"(word_of(four[3])) : "memory");
        }
    }
}
#endif
