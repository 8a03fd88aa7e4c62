// What the two AVX-512 sets share: the rotation, float products, and the loop over rows of int8.
//
// Included by avx512.cpp and avx512vbmi.cpp, each compiled with its own flags.
#pragma once
#include <immintrin.h>

#include "steps.h"

namespace septet {
namespace {

// The four activations of a tile in every 32-bit lane.
inline __m512i broadcast_four(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm512_set1_epi32(four);
}

// One stage of the rotation inside a register: a lane and its partner h lanes away become their sum and difference.
inline __m512 butterfly(__m512 v, __m512 partner, __mmask16 upper) { return _mm512_mask_sub_ps(_mm512_add_ps(v, partner), upper, partner, v); }

// A block of `count` registers, a power of two up to 16, times `factor`: from memory once and back once.
template <int count>
void hadamard_block(float* x, float factor) {
    __m512 v[count];
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) {
        v[i] = _mm512_loadu_ps(x + 16 * i);
        v[i] = butterfly(v[i], _mm512_permute_ps(v[i], 0xB1), 0xAAAA);
        v[i] = butterfly(v[i], _mm512_permute_ps(v[i], 0x4E), 0xCCCC);
        v[i] = butterfly(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0xB1), 0xF0F0);
        v[i] = butterfly(v[i], _mm512_shuffle_f32x4(v[i], v[i], 0x4E), 0xFF00);
    }
#pragma GCC unroll 4
    for (int h = 1; h < count; h *= 2)
#pragma GCC unroll 16
        for (int i = 0; i < count; i++)
            if (!(i & h)) {
                const __m512 a = v[i], b = v[i + h];
                v[i] = _mm512_add_ps(a, b);
                v[i + h] = _mm512_sub_ps(a, b);
            }
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) _mm512_storeu_ps(x + 16 * i, _mm512_mul_ps(v[i], _mm512_set1_ps(factor)));
}

void hadamard(float* x, int64_t count, int64_t block) {
    constexpr int64_t most = 256;
    if (block < 16) return hadamard_from(x, count, block, 1);
    const int64_t at_once = block < most ? block : most;
    const auto transform = at_once == 16 ? hadamard_block<1> : at_once == 32 ? hadamard_block<2> : at_once == 64 ? hadamard_block<4> : at_once == 128 ? hadamard_block<8> : hadamard_block<16>;
    const float factor = block > most ? 1.0f : inverse_root(block);
    for (int64_t i = 0; i < count; i += at_once) transform(x + i, factor);
    if (block > most) hadamard_from(x, count, block, most);
}

void widen(const uint8_t* decoded, int64_t tiles, uint8_t shift, const int32_t* zero, float* values) {
    const __m512i add = _mm512_set1_epi8(static_cast<char>(shift)), low = _mm512_set1_epi32(255);
    const __m512i zeros[2] = {_mm512_set1_epi32(zero[0]), _mm512_set1_epi32(zero[1])};
    for (int64_t tile = 0; tile < tiles; tile++, decoded += kTileWeights, values += kTileWeights)
        for (int quarter = 0; quarter < 4; quarter++) {
            const __m512i bytes = _mm512_add_epi8(_mm512_loadu_si512(decoded + 64 * quarter), add);
            for (int i = 0; i < kTileInputs; i++) {
                const __m512i value = _mm512_and_si512(_mm512_srli_epi32(bytes, 8 * i), low);
                _mm512_storeu_ps(values + i * kTileOutputs + 16 * quarter, _mm512_cvtepi32_ps(_mm512_sub_epi32(value, zeros[i & 1])));
            }
        }
}

[[gnu::flatten]] void float_product(const float* values, int64_t inputs, FloatRows x, float* sums) {
    in_blocks<6>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value;
        const float* input = x.data + first * x.stride;
        float* y = sums + first * kTileOutputs;
        __m512 sum[rows][4], value[4];
        repeat<rows, 4>([&](auto r, auto q) { sum[r][q] = _mm512_loadu_ps(y + r * kTileOutputs + 16 * q); });
        for (int64_t k = 0; k < inputs; k++) {
            repeat<4>([&](auto q) { value[q] = _mm512_loadu_ps(values + k * kTileOutputs + 16 * q); });
            repeat<rows>([&](auto r) {
                const __m512 one = _mm512_set1_ps(input[r * x.stride + k]);
                repeat<4>([&](auto q) { sum[r][q] = _mm512_fmadd_ps(one, value[q], sum[r][q]); });
            });
        }
        repeat<rows, 4>([&](auto r, auto q) { _mm512_storeu_ps(y + r * kTileOutputs + 16 * q, sum[r][q]); });
    });
}

// Blocks of rows of weights times blocks of rows of activations: body(row_count, tokens, row, token), the counts as constants.
template <class Body>
void for_blocks(int64_t rows, int64_t tokens, const Body& body) {
    in_blocks<4>(rows, [&](auto row_count, int64_t row) { in_blocks<4>(tokens, [&](auto token_count, int64_t token) { body(row_count, token_count, row, token); }); });
}

[[gnu::flatten]] void float_row_product(const int8_t* weight, int64_t rows, int64_t features, FloatRows x, float* sums) {
    for_blocks(rows, x.count, [&](auto row_block, auto token_block, int64_t row, int64_t token) {
        constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
        __m512 sum[row_count][tokens], input[tokens];
        repeat<row_count, tokens>([&](auto r, auto m) { sum[r][m] = _mm512_setzero_ps(); });
        for (int64_t k = 0; k < features; k += 16) {
            const __mmask16 valid = features - k >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (features - k)) - 1);
            repeat<tokens>([&](auto m) { input[m] = _mm512_maskz_loadu_ps(valid, x.data + (token + m) * x.stride + k); });
            repeat<row_count>([&](auto r) {
                const __m128i bytes = _mm_maskz_loadu_epi8(valid, weight + (row + r) * features + k);
                const __m512 value = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
                repeat<tokens>([&](auto m) { sum[r][m] = _mm512_fmadd_ps(value, input[m], sum[r][m]); });
            });
        }
        repeat<row_count, tokens>([&](auto r, auto m) { sums[(token + m) * rows + row + r] = _mm512_reduce_add_ps(sum[r][m]); });
    });
}

inline int32_t sum_of(const int8_t* x, int64_t count) {
    int32_t sums[2];
    pair_sums(x, count / 2 * 2, sums);
    return sums[0] + sums[1] + (count % 2 ? x[count - 1] : 0);
}

// With a bias, neither summand need fit what their sum fits.
inline void add_wrapping(int32_t& sum, int32_t part) { sum = static_cast<int32_t>(static_cast<uint32_t>(sum) + static_cast<uint32_t>(part)); }

// Rows of int8 against rows of int8. Dot says how `Dot::inputs` bytes at a time are loaded and multiplied; each product is too large by Dot::bias * sum(x).
template <class Dot>
[[gnu::flatten]] void row_product_with(const int8_t* weight, int64_t rows, int64_t features, Rows x, int32_t* sums) {
    for (int64_t m = 0; m < x.count; m++) {
        const int32_t excess = Dot::bias == 0 ? 0 : Dot::bias * sum_of(x.data + m * x.stride, features);
        for (int64_t r = 0; r < rows; r++) sums[m * rows + r] = -excess;
    }
    for_blocks(rows, x.count, [&](auto row_block, auto token_block, int64_t row, int64_t token) {
        constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
        const int8_t* w = weight + row * features;
        __m512i sum[row_count][tokens], input[tokens];
        // Plain loops: GCC 12 keeps sums that lambdas refer to in memory as well, at half the speed.
#pragma GCC unroll 16
        for (int i = 0; i < row_count * tokens; i++) sum[i / tokens][i % tokens] = _mm512_setzero_si512();
        for (int64_t k = 0; k < features; k += Dot::inputs) {
            const uint64_t valid = features - k >= Dot::inputs ? ~0ull : (1ull << (features - k)) - 1;
#pragma GCC unroll 4
            for (int m = 0; m < tokens; m++) input[m] = Dot::activations(valid, x.data + (token + m) * x.stride + k);
#pragma GCC unroll 4
            for (int r = 0; r < row_count; r++) {
                prefetch_ahead(w + r * features + k);
                const __m512i weights = Dot::weights(valid, w + r * features + k);
#pragma GCC unroll 4
                for (int m = 0; m < tokens; m++) sum[r][m] = Dot::add_product(sum[r][m], weights, input[m]);
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < row_count * tokens; i++) add_wrapping(sums[(token + i % tokens) * rows + row + i / tokens], _mm512_reduce_add_epi32(sum[i / tokens][i % tokens]));
    });
}

}  // namespace
}  // namespace septet
