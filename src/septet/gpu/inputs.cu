// Inputs of products of many tokens: H_in (s_in * x) for Hadamard blocks of at most 256 and inputs in multiples of 8. Follows values.cu.
//
// Blocks of threads along y share a token, one with MODE 1; a warp takes 1024 inputs of it at a time: lane 8c + l has inputs 64j + 8l ..
// 8l+7, j = 0..3, of the c-th 256, so that only strides 8, 16 and 32 leave the lane.
//
// Macros: MODE 0 int8 with a scale per block of 128 or 256, 1 int8 with one per token, 2 int16 with one per 256, as dense.cu wants it;
// WHOLE 1 where Hadamard blocks have 256 inputs: then no butterfly is asked for whether it is there, and nothing is divided.

constexpr int kInputThreads = 256, kInputWarps = kInputThreads / 32, kGroup = 1024;
__shared__ u32 tops[kInputWarps];

__device__ __forceinline__ void rotate_group(float (&v)[4][8], int block, float normal, int lane) {
    #pragma unroll
    for (int h = 1; h < 8; h *= 2)
        if (WHOLE || h < block)
            #pragma unroll
            for (int i = 0; i < 32; i++)
                if (!(i & h)) add_and_subtract(v[i / 8][i % 8], v[i / 8][i % 8 + h]);
    #pragma unroll
    for (int h = 1; h < 8; h *= 2)
        if (WHOLE || 8 * h < block) {
            // mine * -1 + other rounds like other - mine
            const float sign = lane & h ? -1.f : 1.f;
            #pragma unroll
            for (int i = 0; i < 32; i++) v[i / 8][i % 8] = __fmaf_rn(v[i / 8][i % 8], sign, __shfl_xor_sync(~0u, v[i / 8][i % 8], h));
        }
    #pragma unroll
    for (int h = 1; h < 4; h *= 2)
        if (WHOLE || 64 * h < block)
            #pragma unroll
            for (int i = 0; i < 32; i++)
                if (!(i / 8 & h)) add_and_subtract(v[i / 8][i % 8], v[i / 8 + h][i % 8]);
    #pragma unroll
    for (int i = 0; i < 32; i++) v[i / 8][i % 8] = __fmul_rn(v[i / 8][i % 8], normal);
}

// The bytes `which` of four words.
__device__ __forceinline__ u32 bytes_of(const u32* q, int which) {
    const u32 pair = which * 0x11 + 0x40;
    return __byte_perm(__byte_perm(q[0], q[1], pair), __byte_perm(q[2], q[3], pair), 0x5410);
}

__device__ __forceinline__ uint2 eight_int8(const float (&v)[8], const Rounding& rounding) {
    u32 q[8];
    #pragma unroll
    for (int i = 0; i < 8; i++) q[i] = integer(v[i], rounding.factor);
    if (!rounding.finite || __float_as_uint(rounding.factor) >= kInfinity)
        #pragma unroll
        for (int i = 0; i < 8; i++) q[i] = (u32)rounding.int8(v[i]);
    return make_uint2(bytes_of(q, 0), bytes_of(q + 4, 0));
}

// The largest magnitude becomes 32639 = 127 * 256 + 127, so that the upper byte stays below 128 when the lower one is signed.
struct Rounding16 {
    float scale, factor;

    __device__ __forceinline__ Rounding16(u32 top) {
        const float a = __uint_as_float(top);
        const bool tiny = top < 0x08000000;   // below 2^-111 the factor could be infinite
        factor = tiny ? 0.f : __fdiv_rn(32639.f, a);
        scale = tiny ? 0.f : __fdiv_rn(a, 32639.f);
        if (top >= kInfinity) factor = 0.f, scale = __uint_as_float(0x7FC00000);
    }

    __device__ __forceinline__ void store(i8* upper, i8* lower, const float (&v)[8]) const {
        u32 q[8];
        #pragma unroll
        for (int i = 0; i < 8; i++) q[i] = integer(factor == 0.f ? 0.f : v[i], factor);
        *(uint2*)lower = make_uint2(bytes_of(q, 0), bytes_of(q + 4, 0));
        // what the lower byte is negative by is one in the upper
        #pragma unroll
        for (int i = 0; i < 8; i++) q[i] += 128;
        *(uint2*)upper = make_uint2(bytes_of(q, 1), bytes_of(q + 4, 1));
    }
};

// int8 with one scale per token takes two passes, the first of which only looks for the largest magnitude: rotating twice is cheaper than
// memory for what would have to be kept.
extern "C" __global__ void __launch_bounds__(kInputThreads, MODE == 2 ? 3 : 4)
token_inputs(const Value* __restrict__ x, const u16* __restrict__ input_scale, void* __restrict__ to, float* __restrict__ scales,
             int inputs, int padded, int block, float normal) {
    if (WHOLE) block = kChunk;
    const int token = blockIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
    u32 top = 0;
    #pragma unroll 1
    for (int pass = MODE == 1 ? 0 : 1; pass < 2; pass++) {
        const Rounding whole(top, true);
        #pragma unroll 1
        for (int first = (blockIdx.y * kInputWarps + warp) * kGroup; first < padded; first += gridDim.y * kInputWarps * kGroup) {
            const int begin = first + lane / 8 * kChunk + lane % 8 * 8;
            float v[4][8];
            #pragma unroll
            for (int j = 0; j < 4; j++) {
                const int k = begin + 64 * j;
                scaled_inputs(v[j], x + (size_t)token * inputs + k, input_scale + k, k < inputs);
            }
            rotate_group(v, block, normal, lane);
            u32 tops_of[2] = {0, 0};
            if (MODE != 1 || pass == 0) {
                #pragma unroll
                for (int i = 0; i < 32; i++) tops_of[i / 16] = max(tops_of[i / 16], magnitude(v[i / 8][i % 8]));
            }
            if (pass == 0) {
                top = max(top, max(tops_of[0], tops_of[1]));
                continue;
            }
            if (MODE != 1) {
                if (MODE == 2 || WHOLE || block == kChunk) tops_of[0] = tops_of[1] = max(tops_of[0], tops_of[1]);
                #pragma unroll
                for (int h = 1; h < 8; h *= 2)
                    #pragma unroll
                    for (int i = 0; i < 2; i++) tops_of[i] = max(tops_of[i], __shfl_xor_sync(~0u, tops_of[i], h));
            }
#if MODE == 0
            const Rounding low(tops_of[0], true), high = WHOLE ? low : Rounding(tops_of[1], true);
#elif MODE == 2
            const Rounding16 rounding(tops_of[0]);
#endif
            #pragma unroll
            for (int half = 0; half < 2; half++) {
                #pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; j++) {
                    const int k = begin + 64 * j;
                    if (k >= padded) continue;
#if MODE == 2
                    i8* upper = (i8*)to + (size_t)(token / 8 * 16 + token % 8) * padded + k;
                    rounding.store(upper, upper + (size_t)8 * padded, v[j]);
                    if (k % kChunk == 0) scales[token * ((inputs + kChunk - 1) / kChunk) + k / kChunk] = rounding.scale;
#else
#if MODE == 0
                    const Rounding& rounding = half ? high : low;
#else
                    const Rounding& rounding = whole;
#endif
                    *(uint2*)((i8*)to + (size_t)token * padded + k) = eight_int8(v[j], rounding);
                    if (MODE == 0 && k % block == 0 && k < inputs) scales[token * (inputs / block) + k / block] = rounding.scale;
#endif
                }
            }
        }
        if (pass) break;
        top = largest_of_warp(top);
        if (lane == 0) tops[warp] = top;
        __syncthreads();
        for (int i = 0; i < kInputWarps; i++) top = max(top, tops[i]);
        if (threadIdx.x == 0) scales[token] = Rounding(top, true).scale;
    }
}
