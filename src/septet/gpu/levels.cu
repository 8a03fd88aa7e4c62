// Levels of trellis weights as plain matrices, for products of many tokens. Follows decode.cu.
//
// Rows [0, rows * 64) and the inputs of `count` units from `first_unit` on, of a matrix with `units` units a row: int8 [rows * 64][count *
// 64].

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
    fill_table();
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
        uint4* row = to + (((size_t)(at / count) * 64 + 8 * g) * count + at % count) * 4 + t;
        #pragma unroll
        for (int o = 0; o < 8; o++)
            row[(size_t)o * count * 4] = make_uint4(lookup.four(a, o), lookup.four(b, o), lookup.four(c, o), lookup.four(d, o));
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
    }
}
