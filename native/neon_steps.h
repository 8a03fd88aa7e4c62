// What the NEON sets share: windows and levels, float products, the rotation, and the loops around a dot product.
//
// Included by neon.cpp, neon_dotprod.cpp and neon_i8mm.cpp, each compiled with its own flags. A step is 8 pairs, 4 outputs, one per 32-bit lane: tbl brings each
// lane its bytes, and shifts its two windows. The level table is odd-symmetric: tbl of four registers holds the 64 magnitudes, the sign is the seventh index
// bit. A Dot says how four products are added to a lane, or 16 products to four lanes.
#pragma once
#include <arm_neon.h>

#include "steps.h"
#include "tables.h"

namespace septet {
namespace {

constexpr int kSteps = 16, kStepOutputs = 4, kStepWeights = 16;

struct alignas(16) Bytes { uint8_t at[16]; };
struct alignas(16) Shifts { int32_t at[4]; };
inline int8x16_t load_int8(const void* p) { return vld1q_s8(static_cast<const int8_t*>(p)); }

// The four activations of a tile in every 32-bit lane.
inline int8x16_t broadcast_four(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// 16 bytes from byte `begin` of a tile on, without a look outside it: its last bytes are put together, around its end.
template <int bits, int begin>
uint8x16_t tile_part(const uint8_t* tile) {
    constexpr int size = tile_bytes(bits);
    if constexpr (begin + 16 <= size) return vld1q_u8(tile + begin);
    else return vextq_u8(vld1q_u8(tile + size - 16), vld1q_u8(tile), begin + 16 - size);
}

// Where the four bytes of each lane come from. 8 bits: its two windows; else the bytes from where the first window of its output begins.
template <int bits>
constexpr Bytes output_bytes() {
    Bytes index{};
    for (int i = 0; i < 16; i++) index.at[i] = static_cast<uint8_t>(2 * bits * (i / 4) / 8 + (bits == 8 ? (i % 4 + 1) / 2 : i % 4));
    return index;
}
// ushl by a negative number shifts right.
template <int bits>
constexpr Shifts output_shifts() {
    Shifts shift{};
    for (int i = 0; i < 4; i++) shift.at[i] = -(2 * bits * i % 8);
    return shift;
}

template <int width>
struct Windows {
    static constexpr int bits = width;
    static constexpr Bytes kBytes = output_bytes<bits>();
    static constexpr Shifts kShifts = output_shifts<bits>();
    const uint8x16_t bytes = vld1q_u8(kBytes.at);
    const int32x4_t shifts = vld1q_s32(kShifts.at);

    // 8 windows as words.
    template <int step>
    uint16x8_t cut(const uint8_t* tile) const {
        const uint8x16_t lanes = vqtbl1q_u8(tile_part<bits, bits * step>(tile), bytes);
        if constexpr (bits == 8) return vreinterpretq_u16_u8(lanes);
        const uint32x4_t first = vshlq_u32(vreinterpretq_u32_u8(lanes), shifts);
        return vreinterpretq_u16_u32(vsliq_n_u32(first, vshrq_n_u32(first, bits), 16));
    }
};

constexpr bool is_odd_symmetric(const TrellisTable& table) {
    for (int i = 0; i < 64; i++)
        if (table.levels[64 + i] != -table.levels[i]) return false;
    return true;
}

inline uint8x16x4_t load_table(const int8_t* levels) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(levels);
    return {{vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)}};
}

template <int width>
struct TrellisDecoder : Windows<width> {
    static constexpr const TrellisTable& kTable = kTrellisTables[width - 6];
    static_assert(is_odd_symmetric(kTable), "index bit 6 is the sign");
    const uint8x16x4_t magnitudes = load_table(kTable.levels);
    const uint16x8_t c_low = vdupq_n_u16(kTable.multiplier & 0xFFFF), c_high = vdupq_n_u16(kTable.multiplier >> 16);
    const uint8x16_t index_mask = vdupq_n_u8(63), sign_bit = vdupq_n_u8(64);

    // Levels of 4 outputs.
    template <int step>
    int8x16_t decode(const uint8_t* tile) const {
        const uint16x8_t window = this->template cut<step>(tile);
        const uint32x4_t first = vmull_u16(vget_low_u16(window), vget_low_u16(c_low)), second = vmull_high_u16(window, c_low);
        const uint16x8_t carried = vuzp2q_u16(vreinterpretq_u16_u32(first), vreinterpretq_u16_u32(second));
        const uint8x16_t hash = vreinterpretq_u8_u16(vmlaq_u16(carried, window, c_high));
        const uint8x16_t magnitude = vqtbl4q_u8(magnitudes, vandq_u8(hash, index_mask)), negative = vtstq_u8(hash, sign_bit);
        return vreinterpretq_s8_u8(vsubq_u8(veorq_u8(magnitude, negative), negative));
    }
};

struct SplitDecoder : Windows<7> {
    const uint16x8_t first = vdupq_n_u16(0x000F), second = vdupq_n_u16(0x0700);

    template <int step>
    int8x16_t decode(const uint8_t* tile) const {
        const uint16x8_t window = cut<step>(tile);
        return vreinterpretq_s8_u16(vorrq_u16(vandq_u16(window, first), vandq_u16(vshlq_n_u16(window, 4), second)));
    }
};

template <class Decoder>
[[gnu::flatten]] void decode_tiles(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    const Decoder decoder;
    for (int64_t t = 0; t < tiles; t++, packed += tile_bytes(Decoder::bits), decoded += kTileWeights) {
        prefetch_tile(packed);
        repeat<kSteps>([&](auto step) {
            vst1q_u8(decoded + kStepWeights * step, vreinterpretq_u8_s8(decoder.template decode<decltype(step)::value>(packed)));
        });
    }
}

// How many registers of sums of a tile are kept at once for so many rows: 16 in all, as near as it goes. The rest takes further passes.
constexpr int registers_for(int rows) { return rows == 1 ? 16 : rows == 2 ? 8 : 4; }
constexpr int kFusedRows = 2;

template <class Decoder, class Dot>
[[gnu::flatten]] void packed_product(const uint8_t* packed, int64_t tiles, Rows x, int32_t* sums) {
    const Decoder decoder;
    in_blocks<kFusedRows>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value, registers = registers_for(rows);
        repeat<kSteps / registers>([&](auto part) {
            const int8_t* input = x.data + first * x.stride;
            const uint8_t* tile = packed;
            int32_t* y = sums + first * kTileOutputs + part * registers * kStepOutputs;
            int32x4_t sum[rows][registers];
            int8x16_t four[rows];
            repeat<rows, registers>([&](auto r, auto q) { sum[r][q] = vld1q_s32(y + r * kTileOutputs + kStepOutputs * q); });
            for (int64_t t = 0; t < tiles; t++, tile += tile_bytes(Decoder::bits), input += kTileInputs) {
                prefetch_tile(tile);
                repeat<rows>([&](auto r) { four[r] = broadcast_four(input + r * x.stride); });
                repeat<registers>([&](auto q) {
                    const int8x16_t weights = decoder.template decode<decltype(part)::value * registers + decltype(q)::value>(tile);
                    repeat<rows>([&](auto r) { sum[r][q] = Dot::add_levels(sum[r][q], weights, four[r]); });
                });
            }
            repeat<rows, registers>([&](auto r, auto q) { vst1q_s32(y + r * kTileOutputs + kStepOutputs * q, sum[r][q]); });
        });
    });
}

template <class Dot>
[[gnu::flatten]] void decoded_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    in_blocks<4>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value, registers = registers_for(rows);
        for (int part = 0; part < kSteps / registers; part++) {
            const int8_t* input = x.data + first * x.stride;
            const uint8_t* levels = decoded + part * registers * kStepWeights;
            int32_t* y = sums + first * kTileOutputs + part * registers * kStepOutputs;
            int32x4_t sum[rows][registers];
            int8x16_t four[rows];
            repeat<rows, registers>([&](auto r, auto q) { sum[r][q] = vld1q_s32(y + r * kTileOutputs + kStepOutputs * q); });
            for (int64_t t = 0; t < tiles; t++, levels += kTileWeights, input += kTileInputs) {
                repeat<rows>([&](auto r) { four[r] = broadcast_four(input + r * x.stride); });
                repeat<registers>([&](auto q) {
                    const int8x16_t level = load_int8(levels + kStepWeights * q);
                    repeat<rows>([&](auto r) { sum[r][q] = Dot::add_levels(sum[r][q], level, four[r]); });
                });
            }
            repeat<rows, registers>([&](auto r, auto q) { vst1q_s32(y + r * kTileOutputs + kStepOutputs * q, sum[r][q]); });
        }
    });
}

// Blocks of rows of weights times blocks of rows of activations: body(row_count, tokens, row, token), the counts as constants.
template <class Body>
void for_blocks(int64_t rows, int64_t tokens, const Body& body) {
    in_blocks<4>(rows, [&](auto row_count, int64_t row) { in_blocks<4>(tokens, [&](auto token_count, int64_t token) { body(row_count, token_count, row, token); }); });
}

template <class Dot>
[[gnu::flatten]] void row_product(const int8_t* weight, int64_t rows, int64_t features, Rows x, int32_t* sums) {
    constexpr int64_t inputs = 16;
    const int64_t whole = features / inputs * inputs;
    for_blocks(rows, x.count, [&](auto row_block, auto token_block, int64_t row, int64_t token) {
        constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
        int32x4_t sum[row_count][tokens];
        int8x16_t input[tokens];
        repeat<row_count, tokens>([&](auto r, auto m) { sum[r][m] = vdupq_n_s32(0); });
        for (int64_t k = 0; k < whole; k += inputs) {
            repeat<tokens>([&](auto m) { input[m] = load_int8(x.data + (token + m) * x.stride + k); });
            repeat<row_count>([&](auto r) {
                const int8_t* at = weight + (row + r) * features + k;
                prefetch_ahead(at);
                const int8x16_t w = load_int8(at);
                repeat<tokens>([&](auto m) { sum[r][m] = Dot::add_any(sum[r][m], w, input[m]); });
            });
        }
        repeat<row_count, tokens>([&](auto r, auto m) {
            int32_t total = vaddvq_s32(sum[r][m]);
            for (int64_t k = whole; k < features; k++) total += weight[(row + r) * features + k] * x.data[(token + m) * x.stride + k];
            sums[(token + m) * rows + row + r] = total;
        });
    });
}

[[gnu::flatten]] void float_row_product(const int8_t* weight, int64_t rows, int64_t features, FloatRows x, float* sums) {
    constexpr int64_t inputs = 8;
    const int64_t whole = features / inputs * inputs;
    for_blocks(rows, x.count, [&](auto row_block, auto token_block, int64_t row, int64_t token) {
        constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
        float32x4_t sum[row_count][tokens];
        repeat<row_count, tokens>([&](auto r, auto m) { sum[r][m] = vdupq_n_f32(0); });
        for (int64_t k = 0; k < whole; k += inputs)
            repeat<row_count>([&](auto r) {
                const int16x8_t words = vmovl_s8(vld1_s8(weight + (row + r) * features + k));
                const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(words))), high = vcvtq_f32_s32(vmovl_high_s16(words));
                repeat<tokens>([&](auto m) {
                    const float* input = x.data + (token + m) * x.stride + k;
                    sum[r][m] = vfmaq_f32(vfmaq_f32(sum[r][m], low, vld1q_f32(input)), high, vld1q_f32(input + 4));
                });
            });
        repeat<row_count, tokens>([&](auto r, auto m) {
            float total = vaddvq_f32(sum[r][m]);
            for (int64_t k = whole; k < features; k++) total += static_cast<float>(weight[(row + r) * features + k]) * x.data[(token + m) * x.stride + k];
            sums[(token + m) * rows + row + r] = total;
        });
    });
}

// ld4 takes the inputs of 16 outputs apart.
void widen(const uint8_t* decoded, int64_t tiles, uint8_t shift, const int32_t* zero, float* values) {
    for (int64_t tile = 0; tile < tiles; tile++, decoded += kTileWeights, values += kTileWeights)
        for (int quarter = 0; quarter < 4; quarter++) {
            const uint8x16x4_t inputs = vld4q_u8(decoded + 64 * quarter);
            for (int i = 0; i < kTileInputs; i++) {
                const uint8x16_t bytes = vaddq_u8(inputs.val[i], vdupq_n_u8(shift));
                const uint16x8_t words[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes)};
                float* y = values + i * kTileOutputs + 16 * quarter;
                for (int half = 0; half < 2; half++) {
                    const int32x4_t low = vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(words[half]))), high = vreinterpretq_s32_u32(vmovl_high_u16(words[half]));
                    vst1q_f32(y + 8 * half, vcvtq_f32_s32(vsubq_s32(low, vdupq_n_s32(zero[i & 1]))));
                    vst1q_f32(y + 8 * half + 4, vcvtq_f32_s32(vsubq_s32(high, vdupq_n_s32(zero[i & 1]))));
                }
            }
        }
}

[[gnu::flatten]] void float_product(const float* values, int64_t inputs, FloatRows x, float* sums) {
    in_blocks<4>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value, registers = registers_for(rows);
        for (int part = 0; part < kSteps / registers; part++) {
            const float* input = x.data + first * x.stride;
            const float* column = values + part * registers * kStepOutputs;
            float* y = sums + first * kTileOutputs + part * registers * kStepOutputs;
            float32x4_t sum[rows][registers];
            repeat<rows, registers>([&](auto r, auto q) { sum[r][q] = vld1q_f32(y + r * kTileOutputs + kStepOutputs * q); });
            for (int64_t k = 0; k < inputs; k++, column += kTileOutputs, input++)
                repeat<registers>([&](auto q) {
                    const float32x4_t value = vld1q_f32(column + kStepOutputs * q);
                    repeat<rows>([&](auto r) { sum[r][q] = vfmaq_n_f32(sum[r][q], value, input[r * x.stride]); });
                });
            repeat<rows, registers>([&](auto r, auto q) { vst1q_f32(y + r * kTileOutputs + kStepOutputs * q, sum[r][q]); });
        }
    });
}

// Stages 1 and 2 of the rotation inside a register: a lane and its partner become their sum and difference.
void hadamard(float* x, int64_t count, int64_t block) {
    if (block < 4) return hadamard_from(x, count, block, 1);
    for (int64_t i = 0; i < count; i += 4) {
        float32x4_t v = vld1q_f32(x + i);
        const float32x4_t even = vtrn1q_f32(v, v), odd = vtrn2q_f32(v, v);
        v = vtrn1q_f32(vaddq_f32(even, odd), vsubq_f32(even, odd));
        const float32x2_t low = vget_low_f32(v), high = vget_high_f32(v);
        vst1q_f32(x + i, vcombine_f32(vadd_f32(low, high), vsub_f32(low, high)));
    }
    hadamard_from(x, count, block, 4);
}

}  // namespace
}  // namespace septet
