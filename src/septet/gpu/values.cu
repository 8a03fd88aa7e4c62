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
__device__ __forceinline__ void wait_for_inputs() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_the_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ float butterfly(float mine, float other, bool upper) {
    return upper ? __fadd_rn(other, -mine) : __fadd_rn(mine, other);
}

__device__ __forceinline__ u32 magnitude(float v) { return __float_as_uint(v) & 0x7FFFFFFF; }

// How a segment whose largest magnitude has the bits `top` is rounded: to int8, or to two float16 after a power of two.
struct Rounding {
    float scale, factor;
    bool finite;

    __device__ __forceinline__ Rounding(u32 top, bool to_int8) {
        finite = top < kInfinity;
        if (to_int8) {
            const float a = __uint_as_float(top);
            scale = __fdiv_rn(a, 127.f);
            factor = __fdiv_rn(127.f, a);
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
