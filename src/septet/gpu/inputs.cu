// Inputs of products of many tokens: H_in (s_in * x) for Hadamard blocks of at most 256 and inputs in multiples of 8. Follows values.cu.
//
// A block of threads takes a token, a warp 1024 inputs of it at a time: lane 8c + l has inputs 64j + 8l .. 8l+7, j = 0..3, of the c-th 256, so
// that only strides 8, 16 and 32 leave the lane.
//
// Macro: MODE 0 int8 with a scale per block of 128 or 256, 1 int8 with one per token, 2 bfloat16.

constexpr int kInputThreads = 256, kInputWarps = kInputThreads / 32, kGroup = 1024;
__shared__ u32 tops[kInputWarps];

__device__ __forceinline__ u16 to_bfloat(float v) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

__device__ __forceinline__ void add_and_subtract(float& a, float& b) {
    const float old = a;
    a = __fadd_rn(old, b);
    b = __fadd_rn(old, -b);
}

__device__ __forceinline__ void rotate_group(float (&v)[4][8], int block, float normal, int lane) {
    #pragma unroll
    for (int h = 1; h < 8; h *= 2)
        if (h < block)
            #pragma unroll
            for (int i = 0; i < 32; i++)
                if (!(i & h)) add_and_subtract(v[i / 8][i % 8], v[i / 8][i % 8 + h]);
    #pragma unroll
    for (int h = 1; h < 8; h *= 2)
        if (8 * h < block) {
            // mine * -1 + other rounds like other - mine
            const float sign = lane & h ? -1.f : 1.f;
            #pragma unroll
            for (int i = 0; i < 32; i++) v[i / 8][i % 8] = __fmaf_rn(v[i / 8][i % 8], sign, __shfl_xor_sync(~0u, v[i / 8][i % 8], h));
        }
    #pragma unroll
    for (int h = 1; h < 4; h *= 2)
        if (64 * h < block)
            #pragma unroll
            for (int i = 0; i < 32; i++)
                if (!(i / 8 & h)) add_and_subtract(v[i / 8][i % 8], v[i / 8 + h][i % 8]);
    #pragma unroll
    for (int i = 0; i < 32; i++) v[i / 8][i % 8] = __fmul_rn(v[i / 8][i % 8], normal);
}

// Eight values as int8. Between two powers of two of the mantissa the low byte of a float is an integer, rounded to nearest even.
__device__ __forceinline__ uint2 eight_int8(const float (&v)[8], const Rounding& rounding) {
    constexpr float kInteger = 12582912.f;
    u32 q[8];
    #pragma unroll
    for (int i = 0; i < 8; i++) q[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[i], rounding.factor), kInteger));
    if (!rounding.finite || __float_as_uint(rounding.factor) >= kInfinity)
        #pragma unroll
        for (int i = 0; i < 8; i++) q[i] = (u32)rounding.int8(v[i]);
    u32 packed[2];
    #pragma unroll
    for (int i = 0; i < 2; i++) packed[i] = __byte_perm(__byte_perm(q[4 * i], q[4 * i + 1], 0x0040), __byte_perm(q[4 * i + 2], q[4 * i + 3], 0x0040), 0x5410);
    return make_uint2(packed[0], packed[1]);
}

// int8 with one scale per token takes two passes, the first of which only looks for the largest magnitude: rotating twice is cheaper than memory
// for what would have to be kept.
extern "C" __global__ void __launch_bounds__(kInputThreads)
token_inputs(const Value* __restrict__ x, const u16* __restrict__ input_scale, void* __restrict__ to, float* __restrict__ scales,
             int inputs, int padded, int block, float normal) {
    const int token = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 top = 0;
    #pragma unroll 1
    for (int pass = MODE == 1 ? 0 : 1; pass < 2; pass++) {
        const Rounding whole(top, true);
        #pragma unroll 1
        for (int first = warp * kGroup; first < padded; first += kInputWarps * kGroup) {
            const int begin = first + lane / 8 * kChunk + lane % 8 * 8;
            float v[4][8];
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                const int k = begin + 64 * j;
                scaled_inputs(v[j], x + (size_t)token * inputs + k, input_scale + k, k < inputs);
            }
            rotate_group(v, block, normal, lane);
            u32 tops_of[2] = {0, 0};
            if (MODE == 0 || pass == 0) {
                #pragma unroll
                for (int i = 0; i < 32; i++) tops_of[i / 16] = max(tops_of[i / 16], magnitude(v[i / 8][i % 8]));
            }
            if (pass == 0) {
                top = max(top, max(tops_of[0], tops_of[1]));
                continue;
            }
            if (MODE == 0) {
                if (block == kChunk) tops_of[0] = tops_of[1] = max(tops_of[0], tops_of[1]);
                #pragma unroll
                for (int h = 1; h < 8; h *= 2)
                    #pragma unroll
                    for (int i = 0; i < 2; i++) tops_of[i] = max(tops_of[i], __shfl_xor_sync(~0u, tops_of[i], h));
            }
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                const Rounding rounding = MODE == 0 ? Rounding(tops_of[half], true) : whole;
                #pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; j++) {
                    const int k = begin + 64 * j;
                    const size_t at = (size_t)token * padded + k;
                    if (k >= padded) continue;
#if MODE == 2
                    __align__(16) u16 eight[8];
                    #pragma unroll
                    for (int i = 0; i < 8; i++) eight[i] = to_bfloat(v[j][i]);
                    *(uint4*)((u16*)to + at) = *(const uint4*)eight;
#else
                    *(uint2*)((i8*)to + at) = eight_int8(v[j], rounding);
                    if (MODE == 0 && k % block == 0 && k < inputs) scales[token * (inputs / block) + k / block] = rounding.scale;
#endif
                }
            }
        }
        if (pass) break;
        top = __reduce_max_sync(~0u, top);
        if (lane == 0) tops[warp] = top;
        __syncthreads();
        for (int i = 0; i < kInputWarps; i++) top = max(top, tops[i]);
        if (threadIdx.x == 0) scales[token] = Rounding(top, true).scale;
    }
}
