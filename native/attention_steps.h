// 16-lane vectors, and attention over the pages of a cache: scores, softmax and sum of values in one pass that keeps a running maximum.
//
// Included by model_steps.h, once per instruction set.
#pragma once
#include <cstring>
#include <limits>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "model_table.h"
#include "steps.h"

namespace septet {
namespace {

using Floats [[gnu::vector_size(64)]] = float;
using Ints [[gnu::vector_size(64)]] = int32_t;
using Halves [[gnu::vector_size(32)]] = uint16_t;

inline void load(Floats& v, const float* from) { std::memcpy(&v, from, sizeof v); }
inline void store(const Floats& v, float* to) { std::memcpy(to, &v, sizeof v); }

inline float sum_of_lanes(const Floats& v) {
    float lanes[kLanes];
    store(v, lanes);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
    return lanes[0];
}

// Elements index .. index + 15 of an array of a type, as floats.
template <int type>
inline void load_stored(Floats& v, const void* stored, int64_t index) {
    if constexpr (type == kFloat32) return load(v, static_cast<const float*>(stored) + index);
    const uint16_t* from = static_cast<const uint16_t*>(stored) + index;
#if defined(__AVX512F__)
    if constexpr (type == kFloat16) {
        v = reinterpret_cast<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
        return;
    }
#elif defined(__F16C__)
    if constexpr (type == kFloat16) {
        const __m256 low = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
        const __m256 high = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8)));
        std::memcpy(&v, &low, sizeof low);
        std::memcpy(reinterpret_cast<char*>(&v) + sizeof low, &high, sizeof high);
        return;
    }
#elif defined(__aarch64__)
    if constexpr (type == kFloat16) {
        float wide[kLanes];
        for (int i = 0; i < kLanes; i += 4) vst1q_f32(wide + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i))));
        return load(v, wide);
    }
#endif
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Ints wide = __builtin_convertvector(halves, Ints);
    if constexpr (type == kBfloat16) {
        v = reinterpret_cast<Floats>(wide << 16);
        return;
    }
    const Ints magnitude = (wide & 0x7FFF) << 13, sign = (wide & 0x8000) << 16;
    const Ints finite = reinterpret_cast<Ints>(reinterpret_cast<Floats>(magnitude) * 0x1p112f);
    const Ints bits = (magnitude >= 0x0F800000 ? (magnitude | 0x7F800000) : finite) | sign;  // above: infinities and NaN
    v = reinterpret_cast<Floats>(bits);
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
inline void exponential(Floats& x) {
    constexpr float lowest = -87.0f, highest = 88.0f, round_at = 12582912.0f;  // 1.5 * 2^23
    const Ints vanishing = x < lowest;
    const Floats limited = x > highest ? Floats{} + highest : vanishing ? Floats{} + lowest : x;
    const Floats rounded = limited * 1.44269504f + round_at;  // the power of two stands in the last bits
    const Floats n = rounded - round_at;
    const Floats r = limited - n * 0.693145752f - n * 1.42860677e-6f;  // log(2) in two parts; n times the first is exact
    Floats p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    const Ints power = reinterpret_cast<Ints>(rounded) << 23;  // what lies above the last bits leaves at the top
    const Ints result = reinterpret_cast<Ints>(p) + power;
    x = vanishing ? Floats{} : reinterpret_cast<Floats>(result);
}

inline float exponential_of(float x) {
    Floats v = Floats{} + x;
    exponential(v);
    return v[0];
}

// Blocks of positions of a page that hold begin .. end - 1.
struct Blocks {
    int64_t first, last;
    Blocks(int64_t begin, int64_t end) : first(begin / kKeyBlock), last((end + kKeyBlock - 1) / kKeyBlock) {}
};

// scores [rows][kPagePositions] of the positions begin .. end - 1 of a page; minus infinity in the rest of their blocks.
template <int type, int rows>
inline void score_page(const char* keys, const float* queries, int64_t dim, int64_t begin, int64_t end, float* scores) {
    const Blocks blocks(begin, end);
    for (int64_t b = blocks.first; b < blocks.last; b++) {
        Floats sum[rows][2], key[2];
        repeat<rows, 2>([&](auto r, auto half) { sum[r][half] = Floats{}; });
        for (int64_t d = 0; d < dim; d++) {
            repeat<2>([&](auto half) { load_stored<type>(key[half], keys, (b * dim + d) * kKeyBlock + half * kLanes); });
            repeat<rows, 2>([&](auto r, auto half) { sum[r][half] += key[half] * queries[r * dim + d]; });
        }
        repeat<rows, 2>([&](auto r, auto half) { store(sum[r][half], scores + r * kPagePositions + b * kKeyBlock + half * kLanes); });
    }
    constexpr float never = -std::numeric_limits<float>::infinity();
    for (int r = 0; r < rows; r++) {
        for (int64_t i = blocks.first * kKeyBlock; i < begin; i++) scores[r * kPagePositions + i] = never;
        for (int64_t i = end; i < blocks.last * kKeyBlock; i++) scores[r * kPagePositions + i] = never;
    }
}

// Scores of a page -> e^(score - maximum so far), in place. Returns the factor for everything summed up before.
inline float soften_page(float* scores, const Blocks& blocks, float& maximum, float& total) {
    Floats most = Floats{} + maximum, sums{};
    for (int64_t i = blocks.first * kKeyBlock; i < blocks.last * kKeyBlock; i += kLanes) {
        Floats s;
        load(s, scores + i);
        most = s > most ? s : most;
    }
    float highest = maximum;
    for (int lane = 0; lane < kLanes; lane++) highest = most[lane] > highest ? most[lane] : highest;
    for (int64_t i = blocks.first * kKeyBlock; i < blocks.last * kKeyBlock; i += kLanes) {
        Floats s;
        load(s, scores + i);
        s -= highest;
        exponential(s);
        sums += s;
        store(s, scores + i);
    }
    const float factor = exponential_of(maximum - highest);
    total = total * factor + sum_of_lanes(sums);
    maximum = highest;
    return factor;
}

// sums [rows][padded dim] = sums * factor + weights @ values, over the positions begin .. end - 1 of a page.
template <int type, int rows>
inline void add_values(const char* values, const float* weights, const float* factors, int64_t dim, int64_t begin, int64_t end, float* sums) {
    const int64_t width = padded_dim(dim);
    in_blocks<4>(width / kLanes, [&](auto vector_count, int64_t first) {
        constexpr int vectors = decltype(vector_count)::value;
        Floats sum[rows][vectors], value[vectors];
        repeat<rows, vectors>([&](auto r, auto v) {
            load(sum[r][v], sums + r * width + (first + v) * kLanes);
            sum[r][v] *= factors[r];
        });
        for (int64_t position = begin; position < end; position++) {
            repeat<vectors>([&](auto v) { load_stored<type>(value[v], values, position * width + (first + v) * kLanes); });
            repeat<rows, vectors>([&](auto r, auto v) { sum[r][v] += value[v] * weights[r * kPagePositions + position]; });
        }
        repeat<rows, vectors>([&](auto r, auto v) { store(sum[r][v], sums + r * width + (first + v) * kLanes); });
    });
}

// A block of keys and values of a kInt8 page as floats, laid out like a page of kFloat32 that begins with it.
struct FloatBlock {
    alignas(64) float keys[kMaxHeadDim * kKeyBlock], values[kKeyBlock * kMaxHeadDim];

    // Not inlined: once per set is enough.
    [[gnu::noinline]] void widen(const Attention& a, const char* page, int64_t first) {
        const int64_t width = padded_dim(a.dim);
        const int8_t* key = reinterpret_cast<const int8_t*>(page + a.keys) + first * a.dim;
        const int8_t* value = reinterpret_cast<const int8_t*>(page + a.values) + first * width;
        float scales[2][kKeyBlock];
        for (int64_t i = 0; i < 2; i++) std::memcpy(scales[i], page + a.scales + (i * kPagePositions + first) * static_cast<int64_t>(sizeof(float)), sizeof scales[i]);
        for (int64_t d = 0; d < a.dim; d++)
            for (int64_t i = 0; i < kKeyBlock; i++) keys[d * kKeyBlock + i] = static_cast<float>(key[d * kKeyBlock + i]) * scales[0][i];
        for (int64_t i = 0; i < kKeyBlock; i++)
            for (int64_t d = 0; d < width; d++) values[i * width + d] = static_cast<float>(value[i * width + d]) * scales[1][i];
    }
};

// kFloat32 is for kInt8 too, a block at a time.
template <int type>
[[gnu::flatten]] void attend(const Attention& a) {
    FloatBlock block;
    in_blocks<4>(a.rows, [&](auto row_count, int64_t first_row) {
        constexpr int rows = decltype(row_count)::value;
        alignas(64) float scores[rows * kPagePositions], sums[rows * kMaxHeadDim] = {};
        float maximum[rows], total[rows] = {}, factors[rows];
        for (float& m : maximum) m = -std::numeric_limits<float>::infinity();
        const float* queries = a.queries + first_row * a.dim;
        const int64_t piece = a.scales == 0 ? kPagePositions : kKeyBlock;
        for (int64_t start = a.first / piece * piece; start <= a.last; start += piece) {
            const int64_t begin = a.first > start ? a.first - start : 0, end = a.last - start < piece ? a.last - start + 1 : piece;
            const char* page = a.pages[start / kPagePositions];
            const char* keys = page + a.keys;
            const char* values = page + a.values;
            if (type == kFloat32 && a.scales != 0) {
                block.widen(a, page, start % kPagePositions);
                keys = reinterpret_cast<const char*>(block.keys);
                values = reinterpret_cast<const char*>(block.values);
            }
            score_page<type, rows>(keys, queries, a.dim, begin, end, scores);
            for (int r = 0; r < rows; r++) factors[r] = soften_page(scores + r * kPagePositions, Blocks(begin, end), maximum[r], total[r]);
            add_values<type, rows>(values, scores, factors, a.dim, begin, end, sums);
        }
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < a.dim; d++) a.out[(first_row + r) * a.dim + d] = sums[r * padded_dim(a.dim) + d] / total[r];
    });
}

}  // namespace
}  // namespace septet
