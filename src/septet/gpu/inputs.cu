// Inputs of products of many tokens: H_in (s_in * x) for Hadamard blocks of at most 256 and inputs in multiples of 8. Follows values.cu.
//
// Macro: BFLOAT 0 int8 with one scale per token, 1 bfloat16.

constexpr int kInputThreads = 512, kInputWarps = kInputThreads / 32;
__shared__ u32 tops[kInputWarps];

__device__ __forceinline__ u16 to_bfloat(float v) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

// A block of threads takes a token. int8 takes two passes, the first of which only looks for the largest magnitude: rotating twice is
// cheaper than memory for what would have to be kept.
extern "C" __global__ void __launch_bounds__(kInputThreads)
token_inputs(const Value* __restrict__ x, const u16* __restrict__ input_scale, void* __restrict__ to, float* __restrict__ scales,
             int inputs, int padded, int block, float normal) {
    const int token = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5, chunks = (padded + kChunk - 1) / kChunk;
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 top = 0;
    #pragma unroll 1
    for (int pass = BFLOAT; pass < 2; pass++) {
        const Rounding rounding(top, true);
        #pragma unroll 2
        for (int chunk = warp; chunk < chunks; chunk += kInputWarps) {
            const int k = chunk * kChunk + lane * 8;
            float v[8];
            scaled_inputs(v, x + (size_t)token * inputs + k, input_scale + k, k < inputs);
            rotate_chunk(v, block, normal, lane);
            if (pass == 0) {
                #pragma unroll
                for (int i = 0; i < 8; i++) top = max(top, magnitude(v[i]));
                continue;
            }
            if (k >= padded) continue;
            const size_t at = (size_t)token * padded + k;
#if BFLOAT
            __align__(16) u16 eight[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) eight[i] = to_bfloat(v[i]);
            *(uint4*)((u16*)to + at) = *(const uint4*)eight;
#else
            __align__(8) i8 eight[8];
            #pragma unroll
            for (int i = 0; i < 8; i++) eight[i] = rounding.int8(v[i]);
            *(uint2*)((i8*)to + at) = *(const uint2*)eight;
#endif
        }
        if (pass) break;
        top = __reduce_max_sync(~0u, top);
        if (lane == 0) tops[warp] = top;
        __syncthreads();
        for (int i = 0; i < kInputWarps; i++) top = max(top, tops[i]);
        if (threadIdx.x == 0) scales[token] = Rounding(top, true).scale;
    }
}
