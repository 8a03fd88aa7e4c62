// What happens before and after a product: scales, rotation, rounding to int8, and adding the slots of product.cu. Follows values.cu.
//
// Every float step is one rounding in the order of SPEC.md section 4, so rotations and int8 activations have the bits of the CPU's.
// A block of 256 threads holds E * 256 values, value i * 256 + thread in v[i]: rotation strides below 32 go through shuffles, those
// below 256 through shared memory, the others stay in a thread.
//
// Macro: E, values per thread, at least Hadamard block / 256; for `rotate` exactly that, or 1.

constexpr int kThreads = 256, kValues = E * kThreads;
__shared__ float exchange[3][kValues];
__shared__ u32 maxima[8];

// Hadamard blocks of at most kValues, normalized; `normal` is 1 / sqrt(block).
__device__ __forceinline__ void rotate_values(float (&v)[E], int block, float normal) {
    const int tid = threadIdx.x;
    #pragma unroll
    for (int h = 1; h < 32; h *= 2)
        if (h < block)
            #pragma unroll
            for (int i = 0; i < E; i++) v[i] = butterfly(v[i], __shfl_xor_sync(~0u, v[i], h), tid & h);
    #pragma unroll
    for (int stage = 0; stage < 3; stage++) {
        const int h = 32 << stage;
        if (h >= block) break;
        #pragma unroll
        for (int i = 0; i < E; i++) exchange[stage][i * kThreads + tid] = v[i];
        __syncthreads();
        #pragma unroll
        for (int i = 0; i < E; i++) v[i] = butterfly(v[i], exchange[stage][i * kThreads + (tid ^ h)], tid & h);
    }
    #pragma unroll
    for (int h = 1; h < E; h *= 2) {
        if (h * kThreads >= block) break;
        float old[E];
        #pragma unroll
        for (int i = 0; i < E; i++) old[i] = v[i];
        #pragma unroll
        for (int i = 0; i < E; i++) v[i] = butterfly(old[i], old[i ^ h], i & h);
    }
    #pragma unroll
    for (int i = 0; i < E; i++) v[i] = __fmul_rn(v[i], normal);
}

// Of the threads of a Hadamard block: whole warps.
__device__ __forceinline__ u32 largest(u32 mine, int warps) {
    #pragma unroll
    for (int h = 16; h; h /= 2) mine = max(mine, __shfl_xor_sync(~0u, mine, h));
    if ((threadIdx.x & 31) == 0) maxima[threadIdx.x >> 5] = mine;
    __syncthreads();
    const int first = (threadIdx.x >> 5) / warps * warps;
    for (int i = 0; i < warps; i++) mine = max(mine, maxima[first + i]);
    return mine;
}

// H_in (s_in * x). Segmented: rounded with one scale per block, into `to` and `scales` [tokens][inputs / block]. Otherwise float32 into
// `to` [tokens][padded] and the largest magnitude of each kValues inputs into `scales`, for `round_tokens`.
extern "C" __global__ void __launch_bounds__(kThreads)
rotate(const Value* __restrict__ x, const u16* __restrict__ input_scale, void* __restrict__ to, u32* __restrict__ scales,
       int inputs, int padded, int block, float normal, int segmented, int to_int8) {
    const int token = blockIdx.y, tokens = gridDim.y, first = blockIdx.x * kValues + threadIdx.x;
    float v[E];
    let_the_next_begin();
    wait_for_inputs();
    #pragma unroll
    for (int i = 0; i < E; i++) {
        const int k = first + i * kThreads;
        v[i] = k < inputs ? __fmul_rn(read(x[(size_t)token * inputs + k]), of_half(input_scale[k])) : 0.f;
    }
    rotate_values(v, block, normal);
    u32 top = 0;
    #pragma unroll
    for (int i = 0; i < E; i++) top = max(top, magnitude(v[i]));
    const int warps = segmented ? min(block, kThreads) / 32 : kThreads / 32;
    top = largest(top, warps);
    const Rounding rounding(top, to_int8);
    #pragma unroll
    for (int i = 0; i < E; i++) {
        const int k = first + i * kThreads;
        if (k >= padded) continue;
        if (segmented) rounding.store(to, v[i], to_int8, token, tokens, k, padded);
        else ((float*)to)[(size_t)token * padded + k] = v[i];
    }
    if (!segmented) {
        if (threadIdx.x == 0) scales[token * gridDim.x + blockIdx.x] = top;
    } else if (threadIdx.x % (warps * 32) == 0 && first < inputs) {
        scales[token * (inputs / block) + first / block] = __float_as_uint(rounding.scale);
    }
}

// The same for blocks of at most 256 and inputs in multiples of 8, a warp for each 256 inputs.
extern "C" __global__ void __launch_bounds__(kThreads)
rotate_chunks(const Value* __restrict__ x, const u16* __restrict__ input_scale, void* __restrict__ to, u32* __restrict__ scales,
              int inputs, int padded, int block, float normal, int segmented, int to_int8) {
    const int token = blockIdx.y, tokens = gridDim.y, lane = threadIdx.x & 31, chunk = blockIdx.x * (kThreads / 32) + (threadIdx.x >> 5);
    const int k = chunk * kChunk + lane * 8, chunks = (padded + kChunk - 1) / kChunk;
    let_the_next_begin();
    wait_for_inputs();
    if (chunk >= chunks) return;
    float v[8];
    scaled_inputs(v, x + (size_t)token * inputs + k, input_scale + k, k < inputs);
    rotate_chunk(v, block, normal, lane);
    const u32 top = largest_of_chunk(v, segmented ? block : kChunk);
    const Rounding rounding(top, to_int8);
    const size_t at = (size_t)token * padded + k;
    if (k < padded && !segmented) {
        ((float4*)((float*)to + at))[0] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4*)((float*)to + at))[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else if (k < padded && to_int8) {
        __align__(8) i8 eight[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) eight[i] = rounding.int8(v[i]);
        *(uint2*)((i8*)to + at) = *(const uint2*)eight;
    } else if (k < padded) {
        __align__(16) u16 high[8], low[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) rounding.halves(v[i], high[i], low[i]);
        *(uint4*)((u16*)to + at) = *(const uint4*)high;
        *(uint4*)((u16*)to + at + (size_t)tokens * padded) = *(const uint4*)low;
    }
    if (!segmented && lane == 0) scales[token * chunks + chunk] = top;
    if (segmented && k % block == 0 && k < inputs) scales[token * (inputs / block) + k / block] = __float_as_uint(rounding.scale);
}

// float32 [tokens][padded] with one scale per token; `tops` [tokens][parts] are magnitudes of parts of it. 1024 values a block.
extern "C" __global__ void __launch_bounds__(kThreads)
round_tokens(const float* __restrict__ rotated, const u32* __restrict__ tops, void* __restrict__ to, float* __restrict__ scales,
             int parts, int padded, int to_int8) {
    const int token = blockIdx.y;
    u32 top = 0;
    let_the_next_begin();
    wait_for_inputs();
    for (int i = threadIdx.x; i < parts; i += kThreads) top = max(top, tops[token * parts + i]);
    const Rounding rounding(largest(top, kThreads / 32), to_int8);
    #pragma unroll
    for (int i = 0; i < 4; i++) {
        const int k = blockIdx.x * 1024 + i * kThreads + threadIdx.x;
        if (k < padded) rounding.store(to, rotated[(size_t)token * padded + k], to_int8, token, gridDim.y, k, padded);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) scales[token] = rounding.scale;
}

// The worker of product.cu whose range holds unit `u` of `all`.
__device__ __forceinline__ int worker_of(u64 u, u64 all, int workers) {
    const u64 numerator = (u + 1) * workers - 1;
    return (numerator | all) >> 32 ? (int)(numerator / all) : (int)((u32)numerator / (u32)all);
}

// y = s_out * H_out(sums): sums are in the slots of product.cu (units > 0) or in a matrix [tokens][columns], as int32 (to be
// multiplied with their token's scale) or as float32.
extern "C" __global__ void __launch_bounds__(kThreads)
finish(const void* __restrict__ sums, const float* __restrict__ scales, const u16* __restrict__ output_scale, Value* __restrict__ y,
       int outputs, int block, float normal, int integers, int units, int rows, int workers, int columns, int token_scale) {
    const int token = blockIdx.y, tokens = gridDim.y, first = blockIdx.x * kValues + threadIdx.x;
    float v[E];
    let_the_next_begin();
    wait_for_inputs();
    const float scale = token_scale ? scales[token] : 1.f;
    #pragma unroll
    for (int i = 0; i < E; i++) {
        const int o = first + i * kThreads, row = o >> 6;
        int whole = 0;
        float real = 0;
        if (o < outputs && units == 0) {
            const size_t at = (size_t)token * columns + o;
            if (integers) whole = ((const int*)sums)[at];
            else real = ((const float*)sums)[at];
        } else if (o < outputs) {
            const u64 all = (u64)rows * units;
            const int from = worker_of((u64)row * units, all, workers), to = worker_of((u64)(row + 1) * units - 1, all, workers);
            #pragma unroll 8
            for (int w = from; w <= to; w++) {
                const size_t at = ((size_t)(w + row) * tokens + token) * 64 + (o & 63);
                if (integers) whole += ((const int*)sums)[at];
                else real = __fadd_rn(real, ((const float*)sums)[at]);
            }
        }
        v[i] = integers ? (float)whole : real;
        if (token_scale) v[i] = __fmul_rn(scale, v[i]);
    }
    rotate_values(v, block, normal);
    #pragma unroll
    for (int i = 0; i < E; i++) {
        const int o = first + i * kThreads;
        if (o < outputs) y[(size_t)token * outputs + o] = write(__fmul_rn(v[i], of_half(output_scale[o])));
    }
}

// The same for sums in a float32 matrix, scaled already, blocks of at most 256 and outputs in multiples of 8: a warp for each 256 outputs.
extern "C" __global__ void __launch_bounds__(kThreads)
finish_chunks(const float* __restrict__ sums, const u16* __restrict__ output_scale, Value* __restrict__ y, int outputs, int block,
    float normal, int columns) {
    const int token = blockIdx.y, lane = threadIdx.x & 31, chunk = blockIdx.x * (kThreads / 32) + (threadIdx.x >> 5),
        o = chunk * kChunk + lane * 8;
    let_the_next_begin();
    wait_for_inputs();
    if (chunk * kChunk >= outputs) return;
    const bool mine = o < outputs;
    __align__(16) float v[8] = {};
    __align__(16) u16 factor[8] = {};
    __align__(16) Value out[8];
    if (mine) {
        const float4* from = (const float4*)(sums + (size_t)token * columns + o);
        ((float4*)v)[0] = from[0];
        ((float4*)v)[1] = from[1];
        *(uint4*)factor = *(const uint4*)(output_scale + o);
    }
    rotate_chunk(v, block, normal, lane);
    if (!mine) return;
    #pragma unroll
    for (int i = 0; i < 8; i++) out[i] = write(__fmul_rn(v[i], of_half(factor[i])));
    #pragma unroll
    for (int i = 0; i < (int)sizeof(out) / 16; i++) ((uint4*)(y + (size_t)token * outputs + o))[i] = ((const uint4*)out)[i];
}

// Row `indices[blockIdx.y]` of an int8 matrix: s_in * H_in(scale * q); NaN for an index outside.
extern "C" __global__ void __launch_bounds__(kThreads)
embedding(const void* __restrict__ indices, const i8* __restrict__ weight, const u16* __restrict__ weight_scale,
          const Value* __restrict__ signs, Value* __restrict__ y, int wide, int rows, int inputs, int block, float normal) {
    const int first = blockIdx.x * kValues + threadIdx.x;
    wait_for_inputs();
    const long long row = wide ? ((const long long*)indices)[blockIdx.y] : ((const int*)indices)[blockIdx.y];
    const bool inside = row >= 0 && row < rows;
    const float scale = inside ? of_half(weight_scale[row]) : __uint_as_float(0x7FC00000);
    float v[E];
    #pragma unroll
    for (int i = 0; i < E; i++) {
        const int k = first + i * kThreads;
        v[i] = k < inputs ? __fmul_rn(inside ? (float)weight[(size_t)row * inputs + k] : 0.f, scale) : 0.f;
    }
    rotate_values(v, block, normal);
    #pragma unroll
    for (int i = 0; i < E; i++) {
        const int k = first + i * kThreads;
        if (k < inputs) y[(size_t)blockIdx.y * inputs + k] = write(__fmul_rn(v[i], read(signs[k])));
    }
}
