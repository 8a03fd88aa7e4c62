// Products with weights arranged for AVX-512, four tiles side by side: no window needs a permutation, so 64 weights take eight micro-operations.
//
// A strand is an eighth of a tile's stream: 16 pairs, 8 outputs. A group of four tiles is `bits` registers of 16-bit words: register i holds word i of all 32
// strands (arrange.h), so the windows of a step are one shift of two registers that lie one after the other in memory. Step q decodes pair q of every strand,
// which is output 8*k + q/2 and inputs 2*(q%2) and the next of each tile, and a 32-bit lane sums them over two tiles.
// Included by avx512vbmi.cpp.
#pragma once
#include <algorithm>

#include "avx512_steps.h"
#include "strand_steps.h"
#include "tables.h"

namespace septet {
namespace {

constexpr int kBias = 128, kFusedRows = 4, kPairsOfStrand = 16;
constexpr int kGroupInputs = kGroupTiles * kTileInputs, kChunkInputs = 16 * kGroupInputs;

struct alignas(64) Bytes { uint8_t at[64]; };
inline __m512i load(const Bytes& bytes) { return _mm512_load_si512(bytes.at); }

// sum += the products of four unsigned and four signed bytes in every 32-bit lane. GCC 12 makes of the intrinsic copies of the sums, to other registers and
// to memory: where many live at the same time, half the speed. With the element of an array as its operand it stores that after each instruction.
[[gnu::always_inline]] inline void add_dots(__m512i& sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    __m512i in_register = sum;
    asm("vpdpbusd %2, %1, %0" : "+v"(in_register) : "v"(unsigned_bytes), "v"(signed_bytes));
    sum = in_register;
}

constexpr Bytes biased_half(int bits, int half) {
    Bytes levels{};
    for (int i = 0; i < 64; i++) levels.at[i] = static_cast<uint8_t>(kTrellisTables[bits - 6].levels[64 * half + i] + kBias);
    return levels;
}

template <int bits>
struct LevelTable {
    static constexpr Bytes kLow = biased_half(bits, 0), kHigh = biased_half(bits, 1);
    static constexpr uint32_t kMultiplier = kTrellisTables[bits - 6].multiplier;
    const __m512i low = load(kLow), high = load(kHigh);
    const __m512i c_low = _mm512_set1_epi16(static_cast<int16_t>(kMultiplier & 0xFFFF)), c_high = _mm512_set1_epi16(static_cast<int16_t>(kMultiplier >> 16));

    __m512i hash(__m512i window) const { return _mm512_add_epi16(_mm512_mulhi_epu16(window, c_low), _mm512_mullo_epi16(window, c_high)); }
    // Levels + 128 of 32 pairs, from hashes or from windows.
    __m512i hashed_levels(__m512i hashes) const { return _mm512_permutex2var_epi8(low, hashes, high); }
    __m512i levels(__m512i window) const { return hashed_levels(hash(window)); }
};

// 128-bit lanes of a and b in turns: those of the lower half, or of the upper one.
template <bool upper>
__m512i in_turns(__m512i a, __m512i b) {
    constexpr int i = upper ? 4 : 0;
    return _mm512_permutex2var_epi64(a, _mm512_setr_epi64(i, i + 1, i + 8, i + 9, i + 2, i + 3, i + 10, i + 11), b);
}

// The inputs of each group in the order of steps.
inline __m512i order_inputs(__m512i x) { return _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(order_of_inputs())); }

inline __m512i broadcast_eight(const int8_t* x) {
    int64_t eight;
    std::memcpy(&eight, x, sizeof eight);
    return _mm512_set1_epi64(eight);
}

// How a core reads most: rows of tiles side by side, how many bytes are asked for ahead of each, how many steps hashes are found before they are looked up,
// and whether shifts inside a register have ports that multiplications and shifts across two registers do not take (measured: docs/log.md, 2026-11-23).
// Not all sums of four rows fit into registers, and hashes do not beside them.
struct Intel {
    static constexpr int streams = kStreams, ahead = 3072, hashes_ahead = 0;
    static constexpr bool shift_ports = false;
};
struct Zen5 {
    static constexpr int streams = 1, ahead = 12288, hashes_ahead = 4;
    static constexpr bool shift_ports = true;
};

template <int bits, int ahead = Intel::ahead>
inline void prefetch_group(const uint8_t* group) {
    constexpr int line = 64;
    for (int i = 0; i < bits; i++) __builtin_prefetch(group + ahead + i * line);
}

// With `shift_ports` every second window is two shifts and an `or`, so that no port waits for another.
template <int bits, bool shift_ports = false>
struct Strands {
    __m512i word[bits + 1];

    explicit Strands(const uint8_t* group) {
        repeat<bits>([&](auto i) { word[i] = _mm512_loadu_si512(group + 64 * i); });
        // A strand goes on where the next one begins, and the last where the first does: 0 to 3 lie in 128-bit lanes of their own, 4 to 7 beside them.
        word[bits] = _mm512_permutexvar_epi32(_mm512_setr_epi32(4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 2, 3, 0, 1), word[0]);
    }
    template <int step>
    __m512i window() const {
        constexpr int first = step * bits / 16, shift = step * bits % 16;
        if constexpr (shift == 0) return word[first];
        else if constexpr (shift_ports && step % 2 == 1) return _mm512_or_si512(_mm512_srli_epi16(word[first], shift), _mm512_slli_epi16(word[first + 1], 16 - shift));
        else return _mm512_shrdi_epi16(word[first], word[first + 1], shift);
    }
};

// Sums of outputs m and m + 4 of every strand, each in two 32-bit lanes, become one register: see store_in_order.
inline __m512i join_sums(__m512i m, __m512i m_plus_4) {
    const __m512 a = _mm512_castsi512_ps(m), b = _mm512_castsi512_ps(m_plus_4);
    return _mm512_add_epi32(_mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88)), _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xDD)));
}

// What became of joined sums of m = 0 .. 3: outputs 0 .. 63 in order.
inline void store_in_order(const __m512* joined, float* y) {
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm512_castps_si512(joined[i]);
    transpose_dwords(v);
    _mm512_storeu_si512(y, in_turns<false>(v[0], v[2]));
    _mm512_storeu_si512(y + 16, in_turns<true>(v[0], v[2]));
    _mm512_storeu_si512(y + 32, in_turns<false>(v[1], v[3]));
    _mm512_storeu_si512(y + 48, in_turns<true>(v[1], v[3]));
}

// Two steps are all inputs of an output. Each of the four stages puts together what lies further apart: inputs, neighbouring outputs twice, halves of a strand.
template <int bits>
[[gnu::flatten]] void decode_strands(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    const LevelTable<bits> table;
    for (int64_t t = 0; t < tiles; t += kGroupTiles, packed += kGroupTiles * tile_bytes(bits), decoded += kGroupTiles * kTileWeights) {
        prefetch_group<bits>(packed);
        const Strands<bits> strands(packed);
        __m512i half[2][2][4];  // [first or last four outputs of a strand][strands 0 to 3 or 4 to 7]
        repeat<2, 4>([&](auto i, auto m) {
            constexpr int step = 8 * i + 2 * m;
            const __m512i first = table.levels(strands.template window<step>()), last = table.levels(strands.template window<step + 1>());
            half[i][0][m] = _mm512_unpacklo_epi16(first, last);
            half[i][1][m] = _mm512_unpackhi_epi16(first, last);
        });
        repeat<2, 2>([&](auto i, auto strand_half) { transpose_dwords(half[i][strand_half]); });
        repeat<kGroupTiles, 2>([&](auto tile, auto strand_half) {
            const __m512i a = half[0][strand_half][tile], b = half[1][strand_half][tile];
            uint8_t* to = decoded + kTileWeights * tile + kTileWeights / 2 * strand_half;
            _mm512_storeu_si512(to, in_turns<false>(a, b));
            _mm512_storeu_si512(to + 64, in_turns<true>(a, b));
        });
    }
}

// joined[r][i] += the sums of outputs i and i + 4 of the strands, i = first .. first + count - 1, for `rows` rows of ordered activations.
template <int bits, int rows, int first, int count>
[[gnu::flatten]] inline void add_groups(const uint8_t* packed, int64_t tiles, const int8_t (*ordered)[kChunkInputs], __m512i (*joined)[4]) {
    const LevelTable<bits> table;
    __m512i sum[rows][2][count];
    repeat<rows, count>([&](auto r, auto i) { sum[r][0][i] = sum[r][1][i] = _mm512_setzero_si512(); });
    for (int64_t input = 0; input < tiles * kTileInputs; input += kGroupInputs, packed += kGroupTiles * tile_bytes(bits)) {
        if (first == 0) prefetch_group<bits>(packed);
        const Strands<bits> strands(packed);
        repeat<2, count>([&](auto half, auto i) {
            repeat<2>([&](auto part) {
                const __m512i levels = table.levels(strands.template window<8 * half + 2 * (first + i) + part>());
                repeat<rows>([&](auto r) {
                    add_dots(sum[r][half][i], levels, broadcast_eight(ordered[r] + input + 8 * part));
                });
            });
        });
    }
    repeat<rows, count>([&](auto r, auto i) { joined[r][first + i] = _mm512_add_epi32(joined[r][first + i], join_sums(sum[r][0][i], sum[r][1][i])); });
}

// A row of tiles for `rows` tokens. The more there are at once, the fewer outputs fit into registers, so the groups of a chunk are passed several times.
template <int bits, int rows>
[[gnu::flatten]] void strand_tokens(const TileRows& w, int64_t segment_tiles, const SegmentedRows& x, float* y, int64_t y_stride) {
    constexpr int at_once = rows > 2 ? 2 : 4, chunk = kChunkInputs / kTileInputs;
    alignas(64) int8_t ordered[rows][kChunkInputs];
    __m512 total[rows][4];
    repeat<rows, 4>([&](auto r, auto i) { total[r][i] = _mm512_setzero_ps(); });
    for (int64_t segment = 0, begin = 0, end; begin < w.tiles; segment++, begin = end) {
        end = std::min(begin + segment_tiles, w.tiles);
        __m512i joined[rows][4];
        repeat<rows, 4>([&](auto r, auto i) { joined[r][i] = _mm512_setzero_si512(); });
        for (int64_t t = begin; t < end; t += chunk) {
            const int64_t tiles = std::min<int64_t>(chunk, end - t), inputs = tiles * kTileInputs;
            for (int r = 0; r < rows; r++)
                for (int64_t k = 0; k < inputs; k += 64) {
                    const uint64_t valid = inputs - k >= 64 ? ~0ull : (1ull << (inputs - k)) - 1;
                    _mm512_store_si512(ordered[r] + k, order_inputs(_mm512_maskz_loadu_epi8(valid, x.x.data + r * x.x.stride + t * kTileInputs + k)));
                }
            repeat<4 / at_once>([&](auto pass) { add_groups<bits, rows, at_once * pass, at_once>(w.packed + t * tile_bytes(bits), tiles, ordered, joined); });
        }
        for (int r = 0; r < rows; r++) {
            const int32_t* sums = x.sums + 2 * (r * x.step + segment);
            const __m512i bias = _mm512_set1_epi32(-kBias * (sums[0] + sums[1]));
            const __m512 scale = _mm512_set1_ps(x.scales[r * x.step + segment]);
            for (int i = 0; i < 4; i++) total[r][i] = _mm512_add_ps(total[r][i], _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_add_epi32(bias, joined[r][i]))));
        }
    }
    for (int r = 0; r < rows; r++) store_in_order(total[r], y + r * y_stride);
}

template <int bits>
void tokens_product(const TileRows& w, int64_t segment_tiles, const SegmentedRows& x, float* y, int64_t y_stride) {
    in_blocks<kFusedTokens>(x.x.count, [&](auto tokens, int64_t m) {
        const SegmentedRows block = {{x.x.data + m * x.x.stride, x.x.stride, tokens}, x.sums + 2 * m * x.step, x.scales + m * x.step, x.step};
        strand_tokens<bits, tokens>(w, segment_tiles, block, y + m * y_stride, y_stride);
    });
}

// A row of tiles of each of `rows` streams, whose rows lie `distance` rows apart. Short segments would spend their time on sums if those were stored in between.
template <class Core, int bits, int rows>
[[gnu::flatten]] void strand_rows(const uint8_t* packed, int64_t tiles, int64_t distance, const SegmentedRow& x, float* y) {
    const LevelTable<bits> table;
    __m512 total[rows][4];
    repeat<rows, 4>([&](auto row, auto i) { total[row][i] = _mm512_setzero_ps(); });
    const int8_t* input = x.data;
    const uint8_t* at = packed;
    const int64_t stride = distance * tiles * tile_bytes(bits);
    for (int64_t segment = 0, first = 0; first < tiles; segment++, first += x.segment_tiles) {
        const int64_t last = std::min(first + x.segment_tiles, tiles);
        __m512i sum[rows][8];
        repeat<rows, 8>([&](auto row, auto m) { sum[row][m] = _mm512_setzero_si512(); });
        for (int64_t t = first; t < last; t += kGroupTiles, at += kGroupTiles * tile_bytes(bits), input += kGroupInputs) {
            const __m512i ordered = order_inputs(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(input))));
            const __m512i pair[2] = {_mm512_unpacklo_epi64(ordered, ordered), _mm512_unpackhi_epi64(ordered, ordered)};
            repeat<rows>([&](auto row) {
                prefetch_group<bits, Core::ahead>(at + row * stride);
                const Strands<bits, Core::shift_ports> strands(at + row * stride);
                __m512i hash[kPairsOfStrand];
                repeat<Core::hashes_ahead>([&](auto step) { hash[step] = table.hash(strands.template window<step>()); });
                repeat<kPairsOfStrand>([&](auto step) {
                    constexpr int later = step + Core::hashes_ahead;
                    if constexpr (later < kPairsOfStrand) hash[later] = table.hash(strands.template window<later>());
                    add_dots(sum[row][step / 2], table.hashed_levels(hash[step]), pair[step % 2]);
                });
            });
        }
        const __m512i bias = _mm512_set1_epi32(-kBias * (x.sums[2 * segment] + x.sums[2 * segment + 1]));
        const __m512 scale = _mm512_set1_ps(x.scales[segment]);
        repeat<rows, 4>([&](auto row, auto i) {
            const __m512 exact = _mm512_cvtepi32_ps(_mm512_add_epi32(bias, join_sums(sum[row][i], sum[row][i + 4])));
            total[row][i] = _mm512_add_ps(total[row][i], _mm512_mul_ps(scale, exact));
        });
    }
    repeat<rows>([&](auto row) { store_in_order(total[row], y + row * distance * kTileOutputs); });
}

// Each stream goes through a part of the rows, so that what it reads next follows what it has read, at the end of a row, too.
template <class Core, int bits>
void product_in_streams(const TileRows& w, const SegmentedRow& x, float* y) {
    constexpr int streams = Core::streams;
    const int64_t each = w.count / streams, together = each * streams, row_bytes = w.tiles * tile_bytes(bits);
    for (int64_t row = 0; row < each; row++) strand_rows<Core, bits, streams>(w.packed + row * row_bytes, w.tiles, each, x, y + row * kTileOutputs);
    in_blocks<streams - 1>(w.count - together, [&](auto rows, int64_t) {
        strand_rows<Core, bits, rows>(w.packed + together * row_bytes, w.tiles, 1, x, y + together * kTileOutputs);
    });
}

// A Zen 4 was not at hand and is taken for a Zen 5.
template <int bits>
void strands_product(const TileRows& w, const SegmentedRow& x, float* y) {
    if (__builtin_cpu_is("intel")) product_in_streams<Intel, bits>(w, x, y);
    else product_in_streams<Zen5, bits>(w, x, y);
}

}  // namespace
}  // namespace septet
