// Products of a few tokens with trellis weights. Follows decode.cu.
//
// A warp walks over consecutive units and leaves one partial sum per row of tiles it has touched, in a slot of its own; `finish` in
// activations.cu adds them in order. No atomics: the same bits every time.

// Partial sums of `rows` rows of 64 outputs; a segment of inputs with one scale has 2^segment_shift units,
// or segment_shift is -1: one scale per token, which `finish` applies.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
product(const u32* __restrict__ weights, const u32* __restrict__ inputs, const float* __restrict__ scales, u32* __restrict__ slots,
        int rows, int units, int tokens, int workers, int segment_shift, u32 one) {
    const int lane = threadIdx.x & 31, worker = blockIdx.x * WARPS + (threadIdx.x >> 5);
    const u64 all = (u64)rows * units, begin = all * worker / workers;
    int left = worker < workers ? (int)(all * (worker + 1) / workers - begin) : 0;
    const u32 *fours = weights + begin * kUnitWords + lane * 4, *twos = weights + begin * kUnitWords + kWords / 4 * 128 + lane * 2;
    u32 w[kWords], next[kWords];
    if (left) load_unit(w, fours, twos);
    fill_table();
    __syncthreads();
    let_the_next_begin();
    wait_for_inputs();
    if (!left) return;
    const Lookup lookup = {address_parts(lane), one};
    int row = begin / units, unit = begin % units;
    const bool segmented = segment_shift >= 0;
    const int segment_mask = segmented ? (1 << segment_shift) - 1 : 0, segments = segmented ? units + segment_mask >> segment_shift : 1;
    const u32 *row_inputs = inputs + ((size_t)(lane >> 2) * units * 4 + (lane & 3)) * kXWords, *x_at = row_inputs + unit * 4 * kXWords;
    Sums sums;
    sums.clear();
    float total[TILES_OF_8][4][4] = {};
    Inputs x, next_x;
    load_inputs(x, x_at, units, tokens, lane);
    for (;;) {
        const bool row_ends = unit + 1 == units, last = row_ends || left == 1;
        if (left > 1) {
            fours += kUnitWords;
            twos += kUnitWords;
            x_at = row_ends ? row_inputs : x_at + 4 * kXWords;
            load_unit(next, fours, twos);
            load_inputs(next_x, x_at, units, tokens, lane);
        }
        multiply_unit(sums, w, x, lookup, lane);
        if (segmented && (last || (unit + 1 & segment_mask) == 0))
            scale_segment(total, sums, scales, unit >> segment_shift, segments, tokens, lane);
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
            row++;
            unit = -1;
        }
        if (--left == 0) return;
        unit++;
        #pragma unroll
        for (int i = 0; i < kWords; i++) w[i] = next[i];
        #pragma unroll
        for (int i = 0; i < TILES_OF_8 * kXParts * kXWords; i++) (&x[0][0][0])[i] = (&next_x[0][0][0])[i];
    }
}
