// Levels of trellis weights as plain matrices, for products of many tokens. Follows decode.cu.
//
// Rows [0, rows * 64) and the inputs of `count` units from `first_unit` on, of a matrix with `units` units a row: int8 [rows * 64][count * 64],
// or bfloat16 with FLOAT.

#if FLOAT
// The same places as those of `fill_table`: bfloat16 holds every level, too.
__device__ __forceinline__ void fill_bfloat_table() {
    for (int i = threadIdx.x; i < kTableWords / 4; i += blockDim.x) {
        const u32 word = __float_as_uint((float)kLevels[(i >> 4) & 127]) >> 16 << (i >> 3 & 1) * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(kTableAt + 16 * i), "r"(word) : "memory");
    }
}
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
levels(const u32* __restrict__ weights, uint4* __restrict__ to, int rows, int units, int first_unit, int count, u32 one) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, workers = gridDim.x * WARPS, all = rows * count;
    int at = blockIdx.x * WARPS + (threadIdx.x >> 5);
    u32 w[kWords], next[kWords];
    const auto load = [&](u32 (&words)[kWords], int at) {
        const u32* unit_words = weights + ((size_t)(at / count) * units + first_unit + at % count) * kUnitWords;
        load_unit(words, unit_words + lane * 4, unit_words + kWords / 4 * 128 + lane * 2);
    };
    if (at < all) load(w, at);
#if FLOAT
    fill_bfloat_table();
#else
    fill_table();
#endif
    __syncthreads();
    let_the_next_begin();
    // what is written may still be read by the launch before
    wait_for_inputs();
    const Lookup lookup = {address_parts(lane), one};
    for (; at < all; at += workers) {
        u32 a[5], b[5], c[5], d[5];
        if (at + workers < all) load(next, at + workers);
        chunks(w, lane, a, b);
        chunks(w + BITS, lane, c, d);
        uint4* row = to + (((size_t)(at / count) * 64 + 8 * g) * count + at % count) * (FLOAT ? 8 : 4);
        #pragma unroll
        for (int o = 0; o < 8; o++) {
#if FLOAT
            uint4* there = row + (size_t)o * count * 8 + 2 * t;
            there[0] = make_uint4(lookup.two(a, 2 * o), lookup.two(a, 2 * o + 1), lookup.two(b, 2 * o), lookup.two(b, 2 * o + 1));
            there[1] = make_uint4(lookup.two(c, 2 * o), lookup.two(c, 2 * o + 1), lookup.two(d, 2 * o), lookup.two(d, 2 * o + 1));
#else
            row[(size_t)o * count * 4 + t] = make_uint4(lookup.four(a, o), lookup.four(b, o), lookup.four(c, o), lookup.four(d, o));
#endif
        }
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
}
