// Levels of trellis weights for products of many tokens. Follows decode.cu.
//
// Rows [0, rows * 64) and the inputs of `count` units from `first_unit` on, of a matrix with `units` units a row.
// FOR_DENSE 0: a plain matrix, int8 [rows * 64][count * 64].
// FOR_DENSE 1: what dense.cu brings at a time, 128 outputs x 128 inputs, lies side by side: [rows / 2][count / 2][unit of two][row of two]
// [64 outputs][64 inputs], both rounded up to two. In the 4096 bytes of a unit output 8g + o is line 8o + g, so that a warp writes 512
// bytes in a row, and 16-byte pieces of lines are swizzled as the tensor cores want them in shared memory: piece t of a line is its
// (t ^ line / 2 % 4)-th.

#if FOR_DENSE
// The last that the L2 gives up, until dense.cu has read it.
__device__ __forceinline__ void store(uint4* to, uint4 v) {
    u64 last;
    asm("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(last));
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;"
        :: "l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "l"(last) : "memory");
}
#else
__device__ __forceinline__ void store(uint4* to, uint4 v) { *to = v; }
#endif

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
levels(const u32* __restrict__ weights, uint4* __restrict__ to, int rows, int units, int first_unit, int count, u32 one) {
    const int lane = threadIdx.x & 31, g = lane >> 2, workers = gridDim.x * WARPS, all = rows * count;
    int at = blockIdx.x * WARPS + (threadIdx.x >> 5);
    u32 w[kWords], next[kWords];
    const auto load = [&](u32 (&words)[kWords], int at) {
        const u32* unit_words = weights + ((size_t)(at / count) * units + first_unit + at % count) * kUnitWords;
        load_unit(words, unit_words + lane * 4, unit_words + kWords / 4 * 128 + lane * 2);
    };
    if (at < all) load(w, at);
    fill_table();
    __syncthreads();
    let_the_next_begin();
    // what is written may still be read by the launch before
    wait_for_inputs();
    const Lookup lookup = {address_parts(lane), one};
    for (; at < all; at += workers) {
        u32 a[5], b[5], c[5], d[5];
        // before the next are asked for: the compiler lets the first use of a loop's weights wait for all that are under way
        const u32 begun[2] = {beginnings(w, lane), beginnings(w + BITS, lane)};
        if (at + workers < all) load(next, at + workers);
        chunks(w, begun[0], a, b);
        chunks(w + BITS, begun[1], c, d);
#if FOR_DENSE
        constexpr size_t pitch = 32;
        const int row = at / count, unit = at % count;
        const size_t four = (size_t)(row >> 1) * ((count + 1) / 2) + (unit >> 1);
        uint4* first = to + (four * 4 + (unit & 1) * 2 + (row & 1)) * 256 + (lane ^ g >> 1 & 3);
#else
        const size_t pitch = (size_t)count * 4;
        uint4* first = to + (((size_t)(at / count) * 64 + 8 * g) * count + at % count) * 4 + (lane & 3);
#endif
        #pragma unroll
        for (int o = 0; o < 8; o++)
            store(first + o * pitch, make_uint4(lookup.four(a, o), lookup.four(b, o), lookup.four(c, o), lookup.four(d, o)));
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
}
