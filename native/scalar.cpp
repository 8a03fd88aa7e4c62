// The plain kernels: short, portable, and what every other set must equal.
#include "steps.h"
#include "tables.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

// 16 bits of a tile from bit `first` on, round its end.
template <int bits>
unsigned window(const uint8_t* tile, int pair) {
    const int first = bits * pair, byte = first / 8, size = tile_bytes(bits);
    const unsigned value = tile[byte] | tile[(byte + 1) % size] << 8 | static_cast<unsigned>(tile[(byte + 2) % size]) << 16;
    return value >> first % 8 & 0xFFFF;
}

template <int bits>
void decode_trellis(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    const TrellisTable& table = kTrellisTables[bits - 6];
    for (int64_t tile = 0; tile < tiles; tile++, packed += tile_bytes(bits))
        for (int pair = 0; pair < kTilePairs; pair++, decoded += 2) {
            const uint32_t hash = window<bits>(packed, pair) * table.multiplier >> 16;
            decoded[0] = static_cast<uint8_t>(table.levels[hash & 127]);
            decoded[1] = static_cast<uint8_t>(table.levels[hash >> 8 & 127]);
        }
}

void decode_split(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    for (int64_t tile = 0; tile < tiles; tile++, packed += tile_bytes(7))
        for (int pair = 0; pair < kTilePairs; pair++, decoded += 2) {
            const unsigned symbol = window<7>(packed, pair);
            decoded[0] = symbol & 15;
            decoded[1] = symbol >> 4 & 7;
        }
}

void decoded_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    const int8_t* levels = reinterpret_cast<const int8_t*>(decoded);  // split fields are below 16, so they read the same
    for (int64_t m = 0; m < x.count; m++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int8_t* four = x.data + m * x.stride + kTileInputs * tile;
            for (int o = 0; o < kTileOutputs; o++) {
                const int8_t* level = levels + tile * kTileWeights + o * kTileInputs;
                sums[m * kTileOutputs + o] += level[0] * four[0] + level[1] * four[1] + level[2] * four[2] + level[3] * four[3];
            }
        }
}

void row_product(const int8_t* weight, int64_t rows, int64_t features, Rows x, int32_t* sums) {
    for (int64_t m = 0; m < x.count; m++)
        for (int64_t r = 0; r < rows; r++) {
            const int8_t* row = weight + r * features;
            const int8_t* input = x.data + m * x.stride;
            int32_t sum = 0;
            for (int64_t k = 0; k < features; k++) sum += row[k] * input[k];
            sums[m * rows + r] = sum;
        }
}

void widen(const uint8_t* decoded, int64_t tiles, uint8_t shift, const int32_t* zero, float* values) {
    for (int64_t tile = 0; tile < tiles; tile++, decoded += kTileWeights, values += kTileWeights)
        for (int i = 0; i < kTileInputs; i++)
            for (int o = 0; o < kTileOutputs; o++) {
                const uint8_t value = static_cast<uint8_t>(decoded[o * kTileInputs + i] + shift);
                values[i * kTileOutputs + o] = static_cast<float>(value - zero[i & 1]);
            }
}

void float_product(const float* values, int64_t inputs, FloatRows x, float* sums) {
    for (int64_t m = 0; m < x.count; m++)
        for (int64_t k = 0; k < inputs; k++) {
            const float input = x.data[m * x.stride + k];
            for (int o = 0; o < kTileOutputs; o++) sums[m * kTileOutputs + o] += input * values[k * kTileOutputs + o];
        }
}

void float_row_product(const int8_t* weight, int64_t rows, int64_t features, FloatRows x, float* sums) {
    for (int64_t m = 0; m < x.count; m++)
        for (int64_t r = 0; r < rows; r++) {
            float sum = 0;
            for (int64_t k = 0; k < features; k++) sum += static_cast<float>(weight[r * features + k]) * x.data[m * x.stride + k];
            sums[m * rows + r] = sum;
        }
}

void hadamard(float* x, int64_t count, int64_t block) { hadamard_from(x, count, block, 1); }

}  // namespace

const KernelTable kScalarKernels = {
    "scalar", 0, 0,
    {decode_split, decode_trellis<6>, decode_trellis<7>, decode_trellis<8>},
    {nullptr, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    nullptr,
    decoded_product, row_product, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_scalar,
    &kPlainModelSteps,
};

}  // namespace septet
