// Vectors of 16 lanes, which every instruction set gives the same bits, in parts that it computes at a time: GCC keeps longer vectors in memory.
//
// Included by attention_steps.h, once per instruction set. Passed by reference only: by value their ABI would depend on the set.
#pragma once
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "model_table.h"

namespace septet {
namespace {

#if defined(__AVX512F__)
constexpr int kPartLanes = 16;
#elif defined(__AVX__)
constexpr int kPartLanes = 8;
#else
constexpr int kPartLanes = 4;
#endif
constexpr int kParts = kLanes / kPartLanes;

using FloatPart [[gnu::vector_size(4 * kPartLanes)]] = float;
using IntPart [[gnu::vector_size(4 * kPartLanes)]] = int32_t;
using HalfPart [[gnu::vector_size(2 * kPartLanes)]] = uint16_t;

struct Floats {
    FloatPart part[kParts];

    // Calls value(part[i], i), which changes it, for every part.
    template <class Value>
    [[gnu::always_inline]] Floats& set(const Value& value) {
#pragma GCC unroll 4
        for (int i = 0; i < kParts; i++) value(part[i], i);
        return *this;
    }
    [[gnu::always_inline]] Floats& operator+=(const Floats& x) {
        return set([&](FloatPart& y, int i) { y += x.part[i]; });
    }
    [[gnu::always_inline]] Floats& operator*=(float x) {
        return set([&](FloatPart& y, int) { y *= x; });
    }
    [[gnu::always_inline]] Floats& operator-=(float x) {
        return set([&](FloatPart& y, int) { y -= x; });
    }
    // += a * b, rounded twice.
    [[gnu::always_inline]] void add_product(const Floats& a, const Floats& b) {
        set([&](FloatPart& y, int i) { y += a.part[i] * b.part[i]; });
    }
    [[gnu::always_inline]] void add_product(const Floats& a, float b) {
        set([&](FloatPart& y, int i) { y += a.part[i] * b; });
    }
};

inline void load(Floats& v, const float* from) { std::memcpy(&v, from, sizeof v); }
inline void store(const Floats& v, float* to) { std::memcpy(to, &v, sizeof v); }

inline float sum_of_lanes(const Floats& v) {
    float lanes[kLanes];
    store(v, lanes);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// The lanes of one part from float16.
inline void widen_halves(FloatPart& v, const uint16_t* from) {
#if defined(__AVX512F__)
    v = reinterpret_cast<FloatPart>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    v = reinterpret_cast<FloatPart>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
    v = reinterpret_cast<FloatPart>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))));
#else
    HalfPart halves;
    std::memcpy(&halves, from, sizeof halves);
    const IntPart wide = __builtin_convertvector(halves, IntPart);
    const IntPart magnitude = (wide & 0x7FFF) << 13, sign = (wide & 0x8000) << 16;
    const IntPart finite = reinterpret_cast<IntPart>(reinterpret_cast<FloatPart>(magnitude) * 0x1p112f);
    const IntPart bits = (magnitude >= 0x0F800000 ? (magnitude | 0x7F800000) : finite) | sign;  // above: infinities and NaN
    v = reinterpret_cast<FloatPart>(bits);
#endif
}

// Elements index .. index + 15 of an array of a type, as floats.
template <int type>
inline void load_stored(Floats& v, const void* stored, int64_t index) {
    if constexpr (type == kFloat32) return load(v, static_cast<const float*>(stored) + index);
    const uint16_t* from = static_cast<const uint16_t*>(stored) + index;
    v.set([&](FloatPart& y, int i) {
        if constexpr (type == kFloat16) return widen_halves(y, from + i * kPartLanes);
        HalfPart halves;
        std::memcpy(&halves, from + i * kPartLanes, sizeof halves);
        y = reinterpret_cast<FloatPart>(__builtin_convertvector(halves, IntPart) << 16);
    });
}

// The first `valid` of these elements, 0 behind them.
template <int type>
inline void load_some(Floats& v, const void* stored, int64_t index, int64_t valid) {
    if (valid == kLanes) return load_stored<type>(v, stored, index);
    char elements[kLanes * 4] = {};
    std::memcpy(elements, static_cast<const char*>(stored) + index * float_bytes(type), static_cast<size_t>(valid * float_bytes(type)));
    load_stored<type>(v, elements, 0);
}

// x = e^x to about 2 units in the last place; 0 below -87, e^88 above 88, NaN stays NaN.
inline void exponential(FloatPart& x) {
    constexpr float lowest = -87.0f, highest = 88.0f, round_at = 12582912.0f;  // 1.5 * 2^23
    const IntPart vanishing = x < lowest;
    const FloatPart limited = x > highest ? FloatPart{} + highest : vanishing ? FloatPart{} + lowest : x;
    const FloatPart rounded = limited * 1.44269504f + round_at;  // the power of two stands in the last bits
    const FloatPart n = rounded - round_at;
    const FloatPart r = limited - n * 0.693145752f - n * 1.42860677e-6f;  // log(2) in two parts; n times the first is exact
    FloatPart p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const IntPart power = reinterpret_cast<IntPart>(rounded) << 23;  // what lies above the last bits leaves at the top
    const IntPart result = reinterpret_cast<IntPart>(p) + power;
    x = vanishing ? FloatPart{} : reinterpret_cast<FloatPart>(result);
}

inline void exponential(Floats& x) {
    x.set([](FloatPart& y, int) { exponential(y); });
}

inline float exponential_of(float x) {
    FloatPart v = FloatPart{} + x;
    exponential(v);
    return v[0];
}

}  // namespace
}  // namespace septet
