// Units of layer.cu that are decoded before its inputs are there: where they wait, and how they are multiplied. Follows columns.cu.

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

    __device__ __forceinline__ void put(const Operands& e) const { put_operands(at, stride, e); }
    __device__ __forceinline__ void get(Operands& e) const { get_operands(at, stride, e); }
};

// In a branch of its own: the compiler would choose between old and new in every round.
__device__ __forceinline__ void copy_operands(Operands& to, const Operands& from) {
    #pragma unroll
    for (int i = 0; i < 32; i++)
        asm volatile("mov.b32 %0, %1;" : "=r"(to[i / 16][i / 4 % 4][i % 4]) : "r"(from[i / 16][i / 4 % 4][i % 4]));
}

// The first units of a warp, decoded: STORED of them in shared memory, and the last one in registers; with ALL also the one before that,
// `held`. `w` is then the next. Returns where their inputs are, counted in units: a byte for each of the first four.
__device__ __forceinline__ u32 decode_first(const LayerArguments& l, const Share& share, Walk walk, int left, u32 (&w)[kWords],
    Operands& ahead, Operands& held, const Lookup& lookup, const Memory& memory, int lane) {
    u32 places = 0;
    #pragma unroll 1
    for (int i = 0; i < min(STORED + 1 + ALL, left); i++) {
        u32 next[kWords];
        // before the next are asked for: the compiler lets the first use of a loop's weights wait for all that are under way
        const u32 begun[2] = {beginnings(w, lane), beginnings(w + BITS, lane)};
        places |= (u32)memory.place(walk.unit) << 8 * i;
        if (i + 1 < left) {
            walk.step(l, share);
            walk.load(next, lane);
        }
        decode_unit(ahead, w, begun, lookup);
        if (i < STORED) Store(i, worker_of(threadIdx.x / 32), lane).put(ahead);
        else if (ALL && i == STORED) copy_operands(held, ahead);
        #pragma unroll
        for (int j = 0; j < kWords; j++) w[j] = next[j];
    }
    return places;
}

#if ALL
// The sums of each of a warp's units, `left` from the block's unit `begin` on, to shared memory. As many columns of the tensor cores are for
// tokens, and there is one; so each unit has a column of its own, and nothing is done between units. It is every second column, so that
// each of four lanes ends with the sums of one unit.
__device__ __forceinline__ void multiply_all(const LayerArguments& l, int begin, int left, u32 places, const Operands& ahead,
    const Operands& held, const Memory& memory, int lane) {
    const int g = lane >> 2, t = lane & 3, worker = worker_of(threadIdx.x >> 5);
    uint4 x = make_uint4(0, 0, 0, 0);
    if (g % 2 == 0 && g / 2 < left) x = ((const uint4*)memory.values)[(places >> 4 * g & 0xFF) * 4 + t];
    const auto x_of = [&](int unit) {
        const bool mine = g == 2 * unit;
        return make_uint4(mine ? x.x : 0, mine ? x.y : 0, mine ? x.z : 0, mine ? x.w : 0);
    };
    Sums sums;
    sums.clear();
    multiply_operands(sums, held, x_of(STORED));
    multiply_operands(sums, ahead, x_of(STORED + 1));
    #pragma unroll
    for (int i = 0; i < STORED; i++) {
        Operands operands;
        Store(i, worker, lane).get(operands);
        multiply_operands(sums, operands, x_of(i));
    }
    if (t >= left) return;
    const float scale = SEGMENTED ? memory.scales[(places >> 8 * t & 0xFF) >> l.segment_shift] : 1.f;
    #pragma unroll
    for (int v = 0; v < 2; v++) {
        Sum four[4];
        #pragma unroll
        for (int n = 0; n < 4; n++) {
            const int sum = sums.of[0][2 * v + n / 2][n % 2 * 2];
            four[n] = SEGMENTED ? (Sum)__fmul_rn(scale, (float)sum) : (Sum)sum;
        }
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" :: "r"(unit_sums(begin + t, 8 * g + 4 * v)), "r"(word_of(four[0])),
            "r"(word_of(four[1])), "r"(word_of(four[2])), "r"(word_of(four[3])) : "memory");
    }
}
#endif
