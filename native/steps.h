// Float and sum steps as plain loops, for a compiler to vectorize with the flags of the file that includes this.
//
// These define every rounding of the int8 path, so each is written in the order that septet.h states, and the build forbids fused multiply-adds.
// Included once per instruction set; the anonymous namespace keeps the copies apart; `inline` means that not every file needs all of them.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernel_table.h"

namespace septet {
namespace {

// body(0) .. body(n - 1) with constants, so that a compiler keeps the small arrays they index in registers. Use it in [[gnu::flatten]] functions;
// inlined later than at once, GCC 12 has already given those arrays memory.
template <class Body, int... i>
[[gnu::always_inline]] inline void repeat(const Body& body, std::integer_sequence<int, i...>) { (body(std::integral_constant<int, i>{}), ...); }
template <int n, class Body>
[[gnu::always_inline]] inline void repeat(const Body& body) { repeat(body, std::make_integer_sequence<int, n>{}); }
// body(i, j) for all i < n, j < m.
template <int n, int m, class Body>
[[gnu::always_inline]] inline void repeat(const Body& body) {
    repeat<n>([&](auto i) { repeat<m>([&](auto j) { body(i, j); }); });
}

// Calls body(constant n, first) for blocks of n = `most` items, and once for what is left.
template <int n, class Body>
void call_with(int64_t count, int64_t first, const Body& body) {
    if constexpr (n > 0) {
        if (count == n) return body(std::integral_constant<int, n>{}, first);
        call_with<n - 1>(count, first, body);
    }
}
template <int most, class Body>
void in_blocks(int64_t count, const Body& body) {
    for (int64_t first = 0; first < count; first += most) call_with<most>(count - first < most ? count - first : most, first, body);
}

// One pass over weights waits for memory unless it asks ahead. Beyond the end of the weights a prefetch does nothing.
inline void prefetch_ahead(const void* at) {
    constexpr int ahead = 2048;
    __builtin_prefetch(static_cast<const char*>(at) + ahead);
}

inline void prefetch_tile(const uint8_t* tile) {
    constexpr int line = 64;
    prefetch_ahead(tile);
    prefetch_ahead(tile + line);
}

// The same in two steps: far ahead into an outer cache, and nearer into the first one. Where the row of tiles ends before that, what is
// read next lies `skip` bytes further: beside this row, others are read at the same time.
inline void prefetch_tile_twice(const uint8_t* tile, int64_t left, int64_t skip) {
    constexpr int line = 64, to_near = 1024, to_far = 4096;
    const uint8_t* near = tile + to_near + (left > to_near ? 0 : skip);
    const uint8_t* far = tile + to_far + (left > to_far ? 0 : skip);
    for (int part = 0; part < 2; part++) {
        __builtin_prefetch(near + part * line);
        __builtin_prefetch(far + part * line, 0, 2);
    }
}

inline int32_t bits_of(float x) { int32_t bits; std::memcpy(&bits, &x, sizeof bits); return bits; }
inline float float_of(int32_t bits) { float x; std::memcpy(&x, &bits, sizeof x); return x; }

inline void multiply(const float* a, const float* b, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i++) out[i] = a[i] * b[i];
}

// 1 / sqrt(block) as float32; 2^-k is exact, and sqrt(0.5) is correctly rounded here.
inline float inverse_root(int64_t block) {
    double value = 1.0;
    for (; block >= 4; block /= 4) value /= 2;
    return static_cast<float>(block == 2 ? value * 0.70710678118654752440 : value);
}

// Stages h, 2h .. block/2 and the final multiplication.
inline void hadamard_from(float* x, int64_t count, int64_t block, int64_t h) {
    const float factor = inverse_root(block);
    for (const float* end = x + count; x < end; x += block) {
        for (int64_t half = h; half < block; half *= 2)
            for (int64_t start = 0; start < block; start += 2 * half) {
                float* low = x + start;
                float* high = low + half;
                for (int64_t i = 0; i < half; i++) {
                    const float a = low[i], b = high[i];
                    low[i] = a + b;
                    high[i] = a - b;
                }
            }
        for (int64_t i = 0; i < block; i++) x[i] *= factor;
    }
}

inline float quantize(const float* x, int64_t count, int8_t* q) {
    constexpr int32_t infinity = 0x7F800000;
    int32_t largest = 0;  // bit patterns of absolute values order like the values, NaN and infinity on top
    for (int64_t i = 0; i < count; i++) {
        const int32_t magnitude = bits_of(x[i]) & 0x7FFFFFFF;
        largest = magnitude > largest ? magnitude : largest;
    }
    if (largest == 0 || largest >= infinity) {
        for (int64_t i = 0; i < count; i++) q[i] = 0;
        return largest == 0 ? 0.0f : float_of(0x7FC00000);
    }
    const float absmax = float_of(largest), inverse = 127.0f / absmax;
    constexpr float round_at = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even
    for (int64_t i = 0; i < count; i++) {
        float r = x[i] * inverse;
        r = r < 127.0f ? r : 127.0f;
        r = r > -127.0f ? r : -127.0f;
        r = x[i] == 0.0f ? 0.0f : r;  // 0 * inverse is NaN when absmax is so small that inverse is infinite
        q[i] = static_cast<int8_t>(bits_of(r + round_at) - bits_of(round_at));
    }
    return absmax / 127.0f;
}

inline void pair_sums(const int8_t* x, int64_t count, int32_t* sums) {
    int32_t even = 0, odd = 0;
    for (int64_t i = 0; i < count; i += 2) {
        even += x[i];
        odd += x[i + 1];
    }
    sums[0] = even;
    sums[1] = odd;
}

inline void add_segment(const int32_t* sums, float scale, float* y) {
    for (int o = 0; o < kTileOutputs; o++) y[o] = y[o] + scale * static_cast<float>(sums[o]);
}

inline void add_split(const int32_t* sums, const int32_t* x_sums, const SplitGroup& group, float scale, float* y) {
    const int32_t* even = sums;
    const int32_t* odd = sums + kTileOutputs;
    if (group.offset[0] == nullptr) {
        const int32_t even_zero = 8 * x_sums[0], odd_zero = 4 * x_sums[1];
        for (int o = 0; o < kTileOutputs; o++) {
            float t = group.scale[0][o] * static_cast<float>(even[o] - even_zero);
            t = t + group.scale[1][o] * static_cast<float>(odd[o] - odd_zero);
            y[o] = y[o] + scale * t;
        }
        return;
    }
    const float even_sum = static_cast<float>(x_sums[0]), odd_sum = static_cast<float>(x_sums[1]);
    for (int o = 0; o < kTileOutputs; o++) {
        float t = group.scale[0][o] * static_cast<float>(even[o]);
        t = t + group.scale[1][o] * static_cast<float>(odd[o]);
        t = t + group.offset[0][o] * even_sum;
        t = t + group.offset[1][o] * odd_sum;
        y[o] = y[o] + scale * t;
    }
}

// How many bytes ahead of each stream read_sum asks for memory: a Zen 5 whose memory nobody else uses reads 1.1 times as much from further ahead.
inline int read_ahead() {
#if defined(__x86_64__) || defined(__i386__)
    if (__builtin_cpu_is("amd")) return 6144;
#endif
    return 3072;
}

// Two streams with a prefetch each, which of all combinations tried read fastest.
inline uint64_t read_sum(const uint64_t* data, int64_t count) {
    constexpr int streams = 2, line = 8;
    const int64_t ahead = read_ahead() / sizeof(uint64_t);
    const int64_t each = count / (streams * line) * line;
    uint64_t sums[streams][line] = {}, sum = 0;
    for (int64_t i = 0; i < each; i += line)
        for (int s = 0; s < streams; s++) {
            const uint64_t* at = data + s * each + i;
            __builtin_prefetch(at + ahead);
            for (int j = 0; j < line; j++) sums[s][j] += at[j];
        }
    for (const auto& stream : sums)
        for (const uint64_t part : stream) sum += part;
    for (int64_t i = streams * each; i < count; i++) sum += data[i];
    return sum;
}

inline void rescale(float* values, int64_t tiles, const SplitGroup& group) {
    for (int64_t input = 0; input < tiles * kTileInputs; input++, values += kTileOutputs) {
        const float* scale = group.scale[input & 1];
        const float* offset = group.offset[input & 1];
        for (int o = 0; o < kTileOutputs; o++) values[o] = offset == nullptr ? values[o] * scale[o] : values[o] * scale[o] + offset[o];
    }
}

}  // namespace
}  // namespace septet
