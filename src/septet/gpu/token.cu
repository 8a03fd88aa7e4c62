// One token through all layers of a decoder in one launch. Follows attention.cu.
//
// Blocks of threads fill the device, one for each multiprocessor, and go through the same steps; each begins as soon as what it reads is
// there. The level tables stay in shared memory, and the first weights of a step are fetched and decoded while the one before still ends.
// All blocks must run at the same time, so the launch is a cooperative one.

// The beginning: an embedded token becomes the residual stream. One warp for each 256 numbers.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
begin_token(const __grid_constant__ Token t, const Value* embedded, const Value* norm, const u16* input_scale, int block, float normal) {
    const int lane = threadIdx.x & 31, chunk = blockIdx.x * WARPS + (threadIdx.x >> 5);
    wait_for_inputs();
    if (chunk * kChunk >= t.hidden_size) return;
    const Rounder rounder(input_scale, chunk, t.hidden_size, lane);
    const Eight<Value> raw(embedded + rounder.k, rounder.inside), weight(norm + rounder.k, rounder.inside);
    float v[8];
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = read(raw.of[i]);
    keep_stream(t, *t.tag, v, rounder, chunk, lane);
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] *= read(weight.of[i]);
    rounder.give(t, 0, *t.tag, v, block, normal, lane);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) decode_token(const __grid_constant__ Token t) {
    const u32 tag = *t.tag;
    for (int i = threadIdx.x; i < kStepWords; i += 32 * WARPS) ((u32*)&step_at(t.first))[i] = ((const u32*)(t.steps + t.first))[i];
    fill_table();
    wait_for_inputs();
    __syncthreads();
    bool late = false;   // whether this warp comes to a step after the others
    #pragma unroll 1
    for (int i = t.first; i < t.last; i++) {
        if (i + 1 < t.last)
            for (int j = threadIdx.x; j < kStepWords; j += 32 * WARPS) ((u32*)&step_at(i + 1))[j] = ((const u32*)(t.steps + i + 1))[j];
        late = step_at(i).kind == kAttention ? attention_step(t, i, tag + i) : product_step(t, i, tag + i, late);
    }
}

// The end: the residual stream normalized. One warp for each 256 numbers.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
end_token(const __grid_constant__ Token t, const Value* norm, Value* normalized, int steps) {
    const int lane = threadIdx.x & 31, k = (blockIdx.x * WARPS + (threadIdx.x >> 5)) * kChunk + lane * 8;
    wait_for_inputs();
    const float factor = norm_factor(t, *t.tag + steps, lane);
    if (k >= t.hidden_size) return;
    #pragma unroll
    for (int i = 0; i < 8; i++) normalized[k + i] = write(t.hidden[k + i] * factor * read(norm[k + i]));
}

// The next token stands one place further, and its words have other tags.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 1) next_token(u32* tag, int* position, int steps) {
    wait_for_inputs();
    if (threadIdx.x) return;
    *tag += steps + 1;
    *position += 1;
}
