// Products with decoded tiles for the two AVX2 sets: many tokens.
//
// Operands says how decoded weights and four activations become the operands of a Dot, how many rows of activations have their sums in registers beside half of
// a tile's outputs, and by how much levels are too large.
#pragma once
#include "avx2_steps.h"

namespace septet {
namespace {

// sum += some decoded outputs of tiles @ rows of activations. Plain loops: GCC 12 keeps sums that lambdas refer to in memory as well.
template <class Operands, class Dot, int rows, int registers>
[[gnu::always_inline]] inline void add_levels(const uint8_t* levels, int64_t tiles, const int8_t* x, int64_t x_stride, __m256i (&sum)[rows][registers]) {
    for (int64_t t = 0; t < tiles; t++, levels += kTileWeights, x += kTileInputs) {
        Operands operands[rows];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) operands[r].take(broadcast_four(x + r * x_stride));
#pragma GCC unroll 8
        for (int q = 0; q < registers; q++) {
            const __m256i level = load_any(levels + 32 * q);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) sum[r][q] = Dot::add(sum[r][q], operands[r].first(level), operands[r].second(level));
        }
    }
}

// body(constant rows, constant registers, first row, first register): as many sums as registers have room for.
template <class Operands, class Body>
void in_decoded_blocks(int64_t rows, const Body& body) {
    in_blocks<Operands::rows>(rows, [&](auto row_count, int64_t first) {
        constexpr int registers = decltype(row_count)::value == 1 ? kSteps : kSteps / 2;
        for (int q = 0; q < kSteps; q += registers) body(row_count, std::integral_constant<int, registers>{}, first, q);
    });
}

template <class Operands, class Dot>
[[gnu::flatten]] void decoded_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    in_decoded_blocks<Operands>(x.count, [&](auto row_count, auto register_count, int64_t first, int q) {
        constexpr int rows = decltype(row_count)::value, registers = decltype(register_count)::value;
        int32_t* y = sums + first * kTileOutputs + 8 * q;
        __m256i sum[rows][registers];
#pragma GCC unroll 16
        for (int i = 0; i < rows * registers; i++) sum[i / registers][i % registers] = load_any(y + i / registers * kTileOutputs + i % registers * 8);
        add_levels<Operands, Dot>(decoded + 32 * q, tiles, x.data + first * x.stride, x.stride, sum);
#pragma GCC unroll 16
        for (int i = 0; i < rows * registers; i++) store_any(y + i / registers * kTileOutputs + i % registers * 8, sum[i / registers][i % registers]);
    });
}

template <class Operands, class Dot>
[[gnu::flatten]] void add_decoded(const uint8_t* decoded, int64_t tiles, const SegmentedRows& rows_of, float* y) {
    const Rows& x = rows_of.x;
    in_decoded_blocks<Operands>(x.count, [&](auto row_count, auto register_count, int64_t first, int q) {
        constexpr int rows = decltype(row_count)::value, registers = decltype(register_count)::value;
        __m256i sum[rows][registers];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const int32_t* of_x = rows_of.sums + (first + r) * 2 * rows_of.step;
            const __m256i excess = _mm256_set1_epi32(-Operands::bias * (of_x[0] + of_x[1]));
#pragma GCC unroll 8
            for (int i = 0; i < registers; i++) sum[r][i] = excess;
        }
        add_levels<Operands, Dot>(decoded + 32 * q, tiles, x.data + first * x.stride, x.stride, sum);
#pragma GCC unroll 16
        for (int i = 0; i < rows * registers; i++) {
            float* at = y + (first + i / registers) * kTileOutputs + 8 * (q + i % registers);
            const __m256 scale = _mm256_set1_ps(rows_of.scales[(first + i / registers) * rows_of.step]);
            _mm256_storeu_ps(at, _mm256_add_ps(_mm256_loadu_ps(at), _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum[i / registers][i % registers]))));
        }
    });
}

}  // namespace
}  // namespace septet
