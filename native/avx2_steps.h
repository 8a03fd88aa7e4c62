// What the two AVX2 sets share: windows and levels, float products, the rotation, and the loops around a dot product.
//
// Included by avx2.cpp and avxvnni.cpp, each compiled with its own flags. A step is 16 pairs, 8 outputs, one per 32-bit lane. Eight outputs are 2*bits bytes:
// one load brings them to both halves, vpshufb brings each lane its bytes, and a shift its two windows. The level table is odd-symmetric: 64 magnitudes are
// 4 vpshufb, and each set has its own way to choose among them; the sign is the seventh index bit. A Dot says how four products are added to a lane.
#pragma once
#include <immintrin.h>

#include "steps.h"
#include "tables.h"

namespace septet {
namespace {

constexpr int kSteps = 8;

struct alignas(32) Bytes { uint8_t at[32]; };
struct alignas(32) Words { uint32_t at[8]; };
inline __m256i load(const Bytes& bytes) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes.at)); }
inline __m256i load(const Words& words) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(words.at)); }
template <class T> __m256i load_any(const T* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
template <class T> void store_any(T* p, __m256i v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline __m128i load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }

// The same byte or 16-bit word everywhere. Constants from memory rather than _mm256_set1: GCC 12 copies those to the stack where registers run out.
constexpr Bytes repeated_word(uint16_t word) {
    Bytes result{};
    for (int i = 0; i < 32; i++) result.at[i] = static_cast<uint8_t>(word >> 8 * (i % 2));
    return result;
}
constexpr Bytes repeated_byte(uint8_t byte) { return repeated_word(static_cast<uint16_t>(byte << 8 | byte)); }
template <uint8_t byte> constexpr Bytes kRepeatedByte = repeated_byte(byte);
template <uint16_t word> constexpr Bytes kRepeatedWord = repeated_word(word);

// Operations with constants that are read where they are used: GCC 12 would fill the 16 registers with these and keep the rest on the stack.
inline __m256i masked(__m256i x, const Bytes& bytes) {
    __m256i result;
    asm("vpand %2, %1, %0" : "=x"(result) : "x"(x), "m"(bytes));
    return result;
}
inline __m256i plus(__m256i x, const Bytes& bytes) {
    __m256i result;
    asm("vpaddb %2, %1, %0" : "=x"(result) : "x"(x), "m"(bytes));
    return result;
}
inline __m256i sums_of_pairs(__m256i words) {
    __m256i result;
    asm("vpmaddwd %2, %1, %0" : "=x"(result) : "x"(words), "m"(kRepeatedWord<1>));
    return result;
}

// The four activations of a tile in every 32-bit lane.
inline __m256i broadcast_four(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

// 16 bytes from byte `begin` of a tile on, without a look outside it: its last bytes are put together, around its end.
template <int bits, int begin>
__m128i tile_part(const uint8_t* tile) {
    constexpr int size = tile_bytes(bits);
    if constexpr (begin + 16 <= size) return load_half(tile + begin);
    else return _mm_alignr_epi8(load_half(tile), load_half(tile + size - 16), begin + 16 - size);
}

// Where the four bytes of each lane come from. 8 bits: its two windows; else the bytes from where the first window of its output begins.
template <int bits>
constexpr Bytes output_bytes() {
    Bytes index{};
    for (int i = 0; i < 32; i++) {
        const int half = bits == 8 ? 0 : bits * (i / 16);
        index.at[i] = static_cast<uint8_t>(half + 2 * bits * (i / 4 % 4) / 8 + (bits == 8 ? (i % 4 + 1) / 2 : i % 4));
    }
    return index;
}
template <int bits>
constexpr Words output_shifts() {
    Words shift{};
    for (int i = 0; i < 8; i++) shift.at[i] = static_cast<uint32_t>(2 * bits * (i % 4) % 8);
    return shift;
}

template <int width>
struct Windows {
    static constexpr int bits = width;
    static constexpr Bytes kBytes = output_bytes<bits>();
    static constexpr Words kShifts = output_shifts<bits>();
    const __m256i bytes = load(kBytes), shifts = load(kShifts);

    // 16 windows as words.
    template <int step>
    __m256i cut(const uint8_t* tile) const {
        const __m128i low = tile_part<bits, 2 * bits * step>(tile);
        if constexpr (bits == 8) return _mm256_shuffle_epi8(_mm256_inserti128_si256(_mm256_castsi128_si256(low), (tile_part<8, 16 * step + 8>(tile)), 1), bytes);
        const __m256i first = _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(low), bytes), shifts);
        return _mm256_blend_epi16(first, _mm256_slli_epi32(first, 16 - bits), 0xAA);
    }
};

constexpr bool is_odd_symmetric(const TrellisTable& table) {
    for (int i = 0; i < 64; i++)
        if (table.levels[64 + i] != -table.levels[i]) return false;
    return true;
}

// Magnitudes 16 * table .. 16 * table + 15, for vpshufb.
constexpr Bytes sixteen_magnitudes(const TrellisTable& levels, int table) {
    Bytes magnitudes{};
    for (int i = 0; i < 32; i++) magnitudes.at[i] = static_cast<uint8_t>(levels.levels[16 * table + i % 16]);
    return magnitudes;
}

// Windows become hashes: the low seven bits of each byte are the index of a level.
template <int width>
struct TrellisHash : Windows<width> {
    static constexpr const TrellisTable& kTable = kTrellisTables[width - 6];
    static_assert(is_odd_symmetric(kTable), "index bit 6 is the sign");
    const __m256i c_low = load(kRepeatedWord<kTable.multiplier & 0xFFFF>), c_high = load(kRepeatedWord<(kTable.multiplier >> 16)>);

    __m256i hash_of(__m256i window) const { return _mm256_add_epi16(_mm256_mulhi_epu16(window, c_low), _mm256_mullo_epi16(window, c_high)); }
};

// A Decoder makes Factors of 16 windows, two bytes each: hash_of() and levels(). weights() and inputs() make of Factors the unsigned and the signed operand
// of a Dot, decoded() what a buffer holds. Fields are unsigned operands as they are.
struct SplitDecoder : Windows<7> {
    using Factors = __m256i;
    const __m256i first_field = _mm256_set1_epi16(0x000F), second_field = _mm256_set1_epi16(0x0700);

    static __m256i hash_of(__m256i window) { return window; }
    __m256i levels(__m256i window) const {
        return _mm256_or_si256(_mm256_and_si256(window, first_field), _mm256_and_si256(_mm256_slli_epi16(window, 4), second_field));
    }
    static __m256i weights(__m256i fields) { return fields; }
    static __m256i inputs(__m256i, __m256i four) { return four; }
    static __m256i decoded(__m256i fields) { return fields; }
};

constexpr int kGroup = 4;  // steps at once

// Steps first .. first + kGroup - 1 of a tile.
template <int first, class Decoder>
[[gnu::always_inline]] inline void read(const Decoder& decoder, const uint8_t* tile, typename Decoder::Factors (&factors)[kGroup]) {
    __m256i hash[kGroup];
    repeat<kGroup>([&](auto i) { hash[i] = decoder.hash_of(decoder.template cut<first + decltype(i)::value>(tile)); });
    repeat<kGroup>([&](auto i) { factors[i] = decoder.levels(hash[i]); });
}

template <class Decoder>
[[gnu::flatten]] void decode_tiles(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    const Decoder decoder;
    for (int64_t t = 0; t < tiles; t++, packed += tile_bytes(Decoder::bits), decoded += kTileWeights) {
        prefetch_tile(packed);
        repeat<kSteps / kGroup>([&](auto group) {
            constexpr int first = decltype(group)::value * kGroup;
            typename Decoder::Factors factors[kGroup];
            read<first>(decoder, packed, factors);
            repeat<kGroup>([&](auto i) { store_any(decoded + 32 * (first + i), decoder.decoded(factors[i])); });
        });
    }
}

constexpr int kFusedRows = 2;

// sums [rows][64] += the groups `begin` .. `end` - 1 of some tiles @ x.
template <class Dot, int begin, int end, int rows, class Decoder>
void add_tiles(const Decoder& decoder, const uint8_t* tile, int64_t tiles, const int8_t* input, int64_t stride, __m256i (&sum)[rows][kSteps]) {
    for (int64_t t = 0; t < tiles; t++, tile += tile_bytes(Decoder::bits), input += kTileInputs) {
        prefetch_tile(tile);
        __m256i four[rows];
        repeat<rows>([&](auto r) { four[r] = broadcast_four(input + r * stride); });
        repeat<end - begin>([&](auto group) {
            constexpr int first = (begin + decltype(group)::value) * kGroup;
            typename Decoder::Factors factors[kGroup];
            read<first>(decoder, tile, factors);
            repeat<rows>([&](auto r) {
                __m256i inputs[kGroup];
                repeat<kGroup>([&](auto i) { inputs[i] = decoder.inputs(factors[i], four[r]); });
                repeat<kGroup>([&](auto i) { sum[r][first + i] = Dot::add(sum[r][first + i], decoder.weights(factors[i]), inputs[i]); });
            });
        });
    }
}

// The sums of a tile fill half of the registers, so two rows take two passes, each over half of every tile.
template <class Decoder, class Dot>
[[gnu::flatten]] void packed_product(const uint8_t* packed, int64_t tiles, Rows x, int32_t* sums) {
    const Decoder decoder;
    in_blocks<kFusedRows>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value, groups = kSteps / kGroup;
        const int8_t* input = x.data + first * x.stride;
        int32_t* y = sums + first * kTileOutputs;
        __m256i sum[rows][kSteps];
        repeat<rows, kSteps>([&](auto r, auto q) { sum[r][q] = load_any(y + r * kTileOutputs + 8 * q); });
        add_tiles<Dot, 0, groups / rows, rows>(decoder, packed, tiles, input, x.stride, sum);
        if constexpr (rows > 1) add_tiles<Dot, groups / rows, groups, rows>(decoder, packed, tiles, input, x.stride, sum);
        repeat<rows, kSteps>([&](auto r, auto q) { store_any(y + r * kTileOutputs + 8 * q, sum[r][q]); });
    });
}

// One token from the first segment to the last; levels are too large by Decoder::bias.
template <class Decoder, class Dot>
[[gnu::flatten]] void segment_product(const uint8_t* packed, int64_t tiles, const SegmentedRow& x, float* y) {
    const Decoder decoder;
    repeat<kSteps>([&](auto q) { _mm256_storeu_ps(y + 8 * q, _mm256_setzero_ps()); });
    for (int64_t segment = 0, first = 0; first < tiles; segment++, first += x.segment_tiles) {
        const int64_t count = first + x.segment_tiles < tiles ? x.segment_tiles : tiles - first;
        const __m256i excess = _mm256_set1_epi32(-Decoder::bias * (x.sums[2 * segment] + x.sums[2 * segment + 1]));
        __m256i sum[1][kSteps];
        repeat<kSteps>([&](auto q) { sum[0][q] = excess; });
        add_tiles<Dot, 0, kSteps / kGroup, 1>(decoder, packed + first * tile_bytes(Decoder::bits), count, x.data + first * kTileInputs, 0, sum);
        const __m256 scale = _mm256_set1_ps(x.scales[segment]);
        repeat<kSteps>([&](auto q) { _mm256_storeu_ps(y + 8 * q, _mm256_add_ps(_mm256_loadu_ps(y + 8 * q), _mm256_mul_ps(scale, _mm256_cvtepi32_ps(sum[0][q])))); });
    }
}

// A SegmentProduct from a function for one row of tiles.
template <int bits, auto row_product>
void row_by_row(const TileRows& rows, const SegmentedRow& x, float* y) {
    for (int64_t row = 0; row < rows.count; row++) row_product(rows.packed + row * rows.tiles * tile_bytes(bits), rows.tiles, x, y + row * kTileOutputs);
}

inline int32_t sum_lanes(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

inline float sum_lanes(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_permute_ps(half, 0x4E));
    return _mm_cvtss_f32(_mm_add_ps(half, _mm_permute_ps(half, 0xB1)));
}

// Blocks of rows of weights times blocks of rows of activations: body(row_count, tokens, row, token), the counts as constants.
template <class Body>
void for_blocks(int64_t rows, int64_t tokens, const Body& body) {
    in_blocks<4>(rows, [&](auto row_count, int64_t row) { in_blocks<2>(tokens, [&](auto token_count, int64_t token) { body(row_count, token_count, row, token); }); });
}

// Rows of int8 against rows of int8. Row says how Row::inputs bytes at a time are loaded and multiplied; what its products have too much is summed up beside them.
template <class Row>
[[gnu::flatten]] void row_product_with(const int8_t* weight, int64_t rows, int64_t features, Rows x, int32_t* sums) {
    const int64_t whole = features / Row::inputs * Row::inputs;
    for_blocks(rows, x.count, [&](auto row_block, auto token_block, int64_t row, int64_t token) {
        constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
        __m256i sum[row_count][tokens], excess[tokens], input[tokens];
        repeat<tokens>([&](auto m) { excess[m] = _mm256_setzero_si256(); });
        repeat<row_count, tokens>([&](auto r, auto m) { sum[r][m] = _mm256_setzero_si256(); });
        for (int64_t k = 0; k < whole; k += Row::inputs) {
            repeat<tokens>([&](auto m) {
                input[m] = Row::activations(x.data + (token + m) * x.stride + k);
                excess[m] = Row::add_excess(excess[m], input[m]);
            });
            repeat<row_count>([&](auto r) {
                const int8_t* at = weight + (row + r) * features + k;
                prefetch_ahead(at);
                const __m256i w = Row::weights(at);
                repeat<tokens>([&](auto m) { sum[r][m] = Row::add_product(sum[r][m], w, input[m]); });
            });
        }
        repeat<row_count, tokens>([&](auto r, auto m) {
            int32_t total = sum_lanes(_mm256_sub_epi32(sum[r][m], excess[m]));
            for (int64_t k = whole; k < features; k++) total += weight[(row + r) * features + k] * x.data[(token + m) * x.stride + k];
            sums[(token + m) * rows + row + r] = total;
        });
    });
}

[[gnu::flatten]] void float_row_product(const int8_t* weight, int64_t rows, int64_t features, FloatRows x, float* sums) {
    const int64_t whole = features / 8 * 8;
    for_blocks(rows, x.count, [&](auto row_block, auto token_block, int64_t row, int64_t token) {
        constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
        __m256 sum[row_count][tokens], input[tokens];
        repeat<row_count, tokens>([&](auto r, auto m) { sum[r][m] = _mm256_setzero_ps(); });
        for (int64_t k = 0; k < whole; k += 8) {
            repeat<tokens>([&](auto m) { input[m] = _mm256_loadu_ps(x.data + (token + m) * x.stride + k); });
            repeat<row_count>([&](auto r) {
                const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(weight + (row + r) * features + k));
                const __m256 w = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
                repeat<tokens>([&](auto m) { sum[r][m] = _mm256_fmadd_ps(w, input[m], sum[r][m]); });
            });
        }
        repeat<row_count, tokens>([&](auto r, auto m) {
            float total = sum_lanes(sum[r][m]);
            for (int64_t k = whole; k < features; k++) total += static_cast<float>(weight[(row + r) * features + k]) * x.data[(token + m) * x.stride + k];
            sums[(token + m) * rows + row + r] = total;
        });
    });
}

void widen(const uint8_t* decoded, int64_t tiles, uint8_t shift, const int32_t* zero, float* values) {
    const __m256i add = _mm256_set1_epi8(static_cast<char>(shift)), low = _mm256_set1_epi32(255);
    const __m256i zeros[2] = {_mm256_set1_epi32(zero[0]), _mm256_set1_epi32(zero[1])};
    for (int64_t tile = 0; tile < tiles; tile++, decoded += kTileWeights, values += kTileWeights)
        for (int eighth = 0; eighth < 8; eighth++) {
            const __m256i bytes = _mm256_add_epi8(load_any(decoded + 32 * eighth), add);
            for (int i = 0; i < kTileInputs; i++) {
                const __m256i value = _mm256_and_si256(_mm256_srli_epi32(bytes, 8 * i), low);
                _mm256_storeu_ps(values + i * kTileOutputs + 8 * eighth, _mm256_cvtepi32_ps(_mm256_sub_epi32(value, zeros[i & 1])));
            }
        }
}

[[gnu::flatten]] void float_product(const float* values, int64_t inputs, FloatRows x, float* sums) {
    in_blocks<2>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value, registers = 8 / rows;
        for (int part = 0; part < rows; part++) {
            const float* input = x.data + first * x.stride;
            const float* column = values + part * registers * 8;
            float* y = sums + first * kTileOutputs + part * registers * 8;
            __m256 sum[rows][registers];
            repeat<rows, registers>([&](auto r, auto q) { sum[r][q] = _mm256_loadu_ps(y + r * kTileOutputs + 8 * q); });
            for (int64_t k = 0; k < inputs; k++, column += kTileOutputs, input++)
                repeat<registers>([&](auto q) {
                    const __m256 value = _mm256_loadu_ps(column + 8 * q);
                    repeat<rows>([&](auto r) { sum[r][q] = _mm256_fmadd_ps(_mm256_set1_ps(input[r * x.stride]), value, sum[r][q]); });
                });
            repeat<rows, registers>([&](auto r, auto q) { _mm256_storeu_ps(y + r * kTileOutputs + 8 * q, sum[r][q]); });
        }
    });
}

// One stage of the rotation inside a register: a lane and its partner become their sum and difference.
template <int upper>
__m256 butterfly(__m256 v, __m256 partner) {
    return _mm256_blend_ps(_mm256_add_ps(v, partner), _mm256_sub_ps(partner, v), upper);
}

void hadamard(float* x, int64_t count, int64_t block) {
    if (block < 8) return hadamard_from(x, count, block, 1);
    for (int64_t i = 0; i < count; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        v = butterfly<0xAA>(v, _mm256_permute_ps(v, 0xB1));
        v = butterfly<0xCC>(v, _mm256_permute_ps(v, 0x4E));
        v = butterfly<0xF0>(v, _mm256_permute2f128_ps(v, v, 0x01));
        _mm256_storeu_ps(x + i, v);
    }
    hadamard_from(x, count, block, 8);
}

}  // namespace
}  // namespace septet
