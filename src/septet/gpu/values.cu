// Numbers of a model's dtype, butterflies, and rounding activations: what activations.cu and layer.cu share.
// Macro: DTYPE of the model's activations: 0 float32, 1 float16, 2 bfloat16.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
typedef signed char i8;

constexpr u32 kInfinity = 0x7F800000;

#if DTYPE == 0
typedef float Value;
__device__ __forceinline__ float read(Value v) { return v; }
__device__ __forceinline__ Value write(float v) { return v; }
#elif DTYPE == 1
typedef u16 Value;
__device__ __forceinline__ float read(Value v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ Value write(float v) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
#else
typedef u16 Value;
__device__ __forceinline__ float read(Value v) { return __uint_as_float((u32)v << 16); }
__device__ __forceinline__ Value write(float v) { u16 h; asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }
#endif

__device__ __forceinline__ float of_half(u16 v) { float f; asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v)); return f; }
__device__ __forceinline__ u16 to_half(float v) { u16 h; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v)); return h; }

__device__ __forceinline__ float butterfly(float mine, float other, bool upper) {
    return __fmaf_rn(mine, upper ? -1.f : 1.f, other);
}

__device__ __forceinline__ void add_and_subtract(float& a, float& b) {
    const float old = a;
    a = __fadd_rn(old, b);
    b = __fadd_rn(old, -b);
}

__device__ __forceinline__ u32 magnitude(float v) { return __float_as_uint(v) & 0x7FFFFFFF; }

// Between two powers of two the lower bytes of a float are an integer, rounded to nearest even.
__device__ __forceinline__ u32 integer(float v, float factor) { return __float_as_uint(__fadd_rn(__fmul_rn(v, factor), 12582912.f)); }

// How a segment whose largest magnitude has the bits `top` is rounded: to int8, or to two float16 after a power of two.
struct Rounding {
    float scale, factor;
    bool finite;

    __device__ __forceinline__ Rounding(u32 top, bool to_int8) {
        finite = top < kInfinity;
        if (to_int8) {
            const float a = __uint_as_float(top);
            factor = __fdiv_rn(127.f, a);
            // once, not where each value that is not 0 uses it
            asm volatile("" : "+f"(factor));
            scale = __fdiv_rn(a, 127.f);
        } else {
            const u32 exponent = min(267u - min(top >> 23, 254u), 253u);
            factor = __uint_as_float(exponent << 23);
            scale = __uint_as_float((254 - exponent) << 23);
        }
        if (!finite) scale = __uint_as_float(0x7FC00000);
    }

    __device__ __forceinline__ i8 int8(float v) const {
        return v == 0.f || !finite ? 0 : (i8)fminf(fmaxf(rintf(__fmul_rn(v, factor)), -127.f), 127.f);
    }

    __device__ __forceinline__ void halves(float v, u16& high, u16& low) const {
        v = finite ? __fmul_rn(v, factor) : 0.f;
        high = to_half(v);
        low = to_half(__fadd_rn(v, -of_half(high)));
    }

    __device__ __forceinline__ void store(void* to, float v, bool to_int8, int token, int tokens, int k, int padded) const {
        const size_t at = (size_t)token * padded + k;
        if (to_int8) ((i8*)to)[at] = int8(v);
        else halves(v, ((u16*)to)[at], ((u16*)to)[at + (size_t)tokens * padded]);
    }
};

// What follows is for chunks of 256 values, 8 of each lane of a warp, and Hadamard blocks of at most so many.
constexpr int kChunk = 256;

// Strides 1, 2, 4 stay in the lane, 8 .. 128 go through shuffles, `kAtOnce` of them without a branch back: faster, and more code.
template <int kAtOnce = 1>
__device__ __forceinline__ void rotate_chunk(float (&v)[8], int block, float normal, int lane) {
    #pragma unroll
    for (int h = 1; h < 8; h *= 2)
        if (h < block) {
            #pragma unroll
            for (int i = 0; i < 8; i++)
                if (!(i & h)) {
                    const float a = v[i], b = v[i + h];
                    v[i] = __fadd_rn(a, b);
                    v[i + h] = __fadd_rn(a, -b);
                }
        }
    #pragma unroll kAtOnce
    for (int h = 8; h < kChunk; h *= 2)
        if (h < block) {
            #pragma unroll
            for (int i = 0; i < 8; i++) v[i] = butterfly(v[i], __shfl_xor_sync(~0u, v[i], h / 8), lane * 8 & h);
        }
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fmul_rn(v[i], normal);
}

// 8 inputs times their scales; zeros unless `inside`. Pointers are 16-byte aligned.
__device__ __forceinline__ void scaled_inputs(float (&v)[8], const Value* from, const u16* scales, bool inside) {
    __align__(16) Value x[8] = {};
    __align__(16) u16 scale[8] = {};
    if (inside) {
        #pragma unroll
        for (int i = 0; i < (int)sizeof(x) / 16; i++) ((uint4*)x)[i] = ((const uint4*)from)[i];
        *(uint4*)scale = *(const uint4*)scales;
    }
    #pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fmul_rn(read(x[i]), of_half(scale[i]));
}

__device__ __forceinline__ u32 largest_of_warp(u32 top) { return __reduce_max_sync(~0u, top); }

// Bits of the largest magnitude among the lanes that share a block, 8 inputs or more.
__device__ __forceinline__ u32 largest_of_chunk(const float (&v)[8], int block) {
    u32 top = 0;
    #pragma unroll
    for (int i = 0; i < 8; i++) top = max(top, magnitude(v[i]));
    for (int h = 1; h < block / 8; h *= 2) top = max(top, __shfl_xor_sync(~0u, top, h));
    return top;
}
