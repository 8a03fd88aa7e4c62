// NEON with dot products and int8 matrix products: smmla multiplies two outputs with two tokens over eight inputs. See neon_steps.h.
//
// One token is what sdot does best, so smmla is for decoded tiles and two tokens or more: two tiles side by side give it its eight inputs.
#include "neon_dot.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

// A register of 4 outputs of each of two tiles -> two registers of 2 outputs x 8 inputs.
struct TilePair {
    int8x16_t low, high;
    TilePair(const uint8_t* first, const uint8_t* second) {
        const int32x4_t a = vreinterpretq_s32_s8(load_int8(first)), b = vreinterpretq_s32_s8(load_int8(second));
        low = vreinterpretq_s8_s32(vzip1q_s32(a, b));
        high = vreinterpretq_s8_s32(vzip2q_s32(a, b));
    }
};

// y[0 .. 3] += the even lanes of two sums [output][token], and the next token's the odd ones.
inline void add_lanes(int32x4_t low, int32x4_t high, int32_t* y) {
    vst1q_s32(y, vaddq_s32(vld1q_s32(y), vuzp1q_s32(low, high)));
    vst1q_s32(y + kTileOutputs, vaddq_s32(vld1q_s32(y + kTileOutputs), vuzp2q_s32(low, high)));
}

// Pairs of tokens, pairs of tiles.
[[gnu::flatten]] void paired_product(const uint8_t* decoded, int64_t tile_pairs, Rows x, int32_t* sums) {
    constexpr int registers = 4;
    in_blocks<2>(x.count / 2, [&](auto pair_count, int64_t first) {
        constexpr int pairs = decltype(pair_count)::value;
        for (int part = 0; part < kSteps / registers; part++) {
            const int8_t* input = x.data + 2 * first * x.stride;
            const uint8_t* levels = decoded + part * registers * kStepWeights;
            int32_t* y = sums + 2 * first * kTileOutputs + part * registers * kStepOutputs;
            int32x4_t low[pairs][registers], high[pairs][registers];
            int8x16_t two[pairs];
            repeat<pairs, registers>([&](auto p, auto q) { low[p][q] = high[p][q] = vdupq_n_s32(0); });
            for (int64_t t = 0; t < tile_pairs; t++, levels += 2 * kTileWeights, input += 2 * kTileInputs) {
                repeat<pairs>([&](auto p) { two[p] = vcombine_s8(vld1_s8(input + 2 * p * x.stride), vld1_s8(input + (2 * p + 1) * x.stride)); });
                repeat<registers>([&](auto q) {
                    const TilePair weights(levels + kStepWeights * q, levels + kTileWeights + kStepWeights * q);
                    repeat<pairs>([&](auto p) {
                        low[p][q] = vmmlaq_s32(low[p][q], weights.low, two[p]);
                        high[p][q] = vmmlaq_s32(high[p][q], weights.high, two[p]);
                    });
                });
            }
            repeat<pairs, registers>([&](auto p, auto q) { add_lanes(low[p][q], high[p][q], y + 2 * p * kTileOutputs + kStepOutputs * q); });
        }
    });
}

// What has no partner, a last tile or a last token, goes through sdot.
void matrix_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    const int64_t paired_tiles = tiles / 2 * 2, paired_rows = x.count / 2 * 2;
    paired_product(decoded, tiles / 2, x, sums);
    if (paired_tiles < tiles)
        decoded_product<FourDot>(decoded + paired_tiles * kTileWeights, 1, {x.data + paired_tiles * kTileInputs, x.stride, paired_rows}, sums);
    if (paired_rows < x.count)
        decoded_product<FourDot>(decoded, tiles, {x.data + paired_rows * x.stride, x.stride, 1}, sums + paired_rows * kTileOutputs);
}

}  // namespace

const KernelTable kNeonI8mmKernels = {
    "neon-i8mm", 0, kFusedRows,
    {decode_tiles<SplitDecoder>, decode_tiles<TrellisDecoder<6>>, decode_tiles<TrellisDecoder<7>>, decode_tiles<TrellisDecoder<8>>},
    {packed_product<SplitDecoder, FourDot>, packed_product<TrellisDecoder<6>, FourDot>, packed_product<TrellisDecoder<7>, FourDot>,
     packed_product<TrellisDecoder<8>, FourDot>},
    {nullptr, nullptr, nullptr, nullptr},
    nullptr,
    matrix_product, row_product<FourDot>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_neon,
    &kPlainModelSteps,
};

}  // namespace septet
