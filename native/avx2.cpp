// AVX2 with FMA: vpmaddubsw and vpmaddwd add up the four products of a lane. See avx2_steps.h.
//
// vpmaddubsw wants an unsigned and a signed operand. For one or two tokens the magnitudes of the levels are the unsigned one, and their signs go to the
// activations; decoded levels keep theirs, |x| is unsigned and its sign goes to the level. 2 * 128 * 127 fits int16, so nothing saturates.
#include "avx2_strands.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

// Bytes of `set` where bit 7 of the selector is set. An instruction, because GCC 12 compares a selector that serves two intrinsics with 0 first.
inline __m256i blended(__m256i clear, __m256i set, __m256i selector) {
    __m256i result;
    asm("vpblendvb %3, %2, %1, %0" : "=x"(result) : "x"(clear), "x"(set), "x"(selector));
    return result;
}

// The sign is what vpsignb wants: index bit 6 on top, and never 0.
struct SignedBytes { __m256i magnitude, sign; };

// vpshufb looks at bits 0 to 3 and 7 of an index; bits 4 and 5 choose among four tables.
template <int bits>
struct SignedDecoder : TrellisHash<bits> {
    using Factors = SignedBytes;
    using TrellisHash<bits>::kTable;
    static constexpr int32_t bias = 0;
    static constexpr Bytes kMagnitudes[4] = {sixteen_magnitudes(kTable, 0), sixteen_magnitudes(kTable, 1),
                                             sixteen_magnitudes(kTable, 2), sixteen_magnitudes(kTable, 3)};
    const __m256i table[4] = {load(kMagnitudes[0]), load(kMagnitudes[1]), load(kMagnitudes[2]), load(kMagnitudes[3])};

    [[gnu::always_inline]] SignedBytes levels(__m256i hash) const {
        const __m256i index = masked(hash, kRepeatedByte<127>);
        const __m256i bit_4 = _mm256_slli_epi16(index, 3), bit_5 = _mm256_slli_epi16(index, 2);
        const __m256i low = blended(_mm256_shuffle_epi8(table[0], index), _mm256_shuffle_epi8(table[1], index), bit_4);
        const __m256i high = blended(_mm256_shuffle_epi8(table[2], index), _mm256_shuffle_epi8(table[3], index), bit_4);
        return {blended(low, high, bit_5), plus(index, kRepeatedByte<64>)};
    }
    static __m256i weights(const SignedBytes& levels) { return levels.magnitude; }
    static __m256i inputs(const SignedBytes& levels, __m256i four) { return _mm256_sign_epi8(four, levels.sign); }
    static __m256i decoded(const SignedBytes& levels) { return _mm256_sign_epi8(levels.magnitude, levels.sign); }
};

struct PairDot {
    static __m256i add(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
        return _mm256_add_epi32(sum, sums_of_pairs(_mm256_maddubs_epi16(unsigned_bytes, signed_bytes)));
    }
};

struct SignedLevels {
    static constexpr int rows = 2;
    static constexpr int32_t bias = 0;
    __m256i four, magnitude;
    void take(__m256i x) {
        four = x;
        magnitude = _mm256_abs_epi8(x);
    }
    __m256i first(__m256i) const { return magnitude; }
    __m256i second(__m256i level) const { return _mm256_sign_epi8(level, four); }
};

// Both operands as int16: exact for every int8.
struct WideRow {
    static constexpr int inputs = 16;
    static __m256i activations(const int8_t* x) { return _mm256_cvtepi8_epi16(load_half(x)); }
    static __m256i weights(const int8_t* w) { return _mm256_cvtepi8_epi16(load_half(w)); }
    static __m256i add_excess(__m256i excess, __m256i) { return excess; }
    static __m256i add_product(__m256i sum, __m256i w, __m256i x) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
};

// -(-128) is no int8. Our own rounding never makes it, but any int8 is allowed.
bool holds_lowest(const int8_t* x, int64_t count) {
    __m256i found = _mm256_setzero_si256();
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) found = _mm256_or_si256(found, _mm256_cmpeq_epi8(load_any(x + i), load(kRepeatedByte<0x80>)));
    bool in_rest = false;
    for (; i < count; i++) in_rest |= x[i] == -128;
    return in_rest || !_mm256_testz_si256(found, found);
}

template <int bits>
void packed_levels(const uint8_t* packed, int64_t tiles, Rows x, int32_t* sums) {
    bool lowest = false;
    for (int64_t r = 0; r < x.count; r++) lowest |= holds_lowest(x.data + r * x.stride, tiles * kTileInputs);
    if (!lowest) return packed_product<SignedDecoder<bits>, PairDot>(packed, tiles, x, sums);
    alignas(32) uint8_t decoded[kTileWeights];
    for (int64_t t = 0; t < tiles; t++) {
        decode_tiles<SignedDecoder<bits>>(packed + t * tile_bytes(bits), 1, decoded);
        decoded_product<SignedLevels, PairDot>(decoded, 1, {x.data + t * kTileInputs, x.stride, x.count}, sums);
    }
}

// A row of tiles, decoded into a buffer.
template <int bits, DecodeTiles decode>
void decoded_row(const uint8_t* packed, int64_t tiles, const SegmentedRow& x, float* y) {
    constexpr int64_t at_once = 4 * kGroupTiles;
    alignas(32) uint8_t decoded[at_once * kTileWeights];
    std::memset(y, 0, kTileOutputs * sizeof(float));
    for (int64_t segment = 0, first = 0; first < tiles; segment++, first += x.segment_tiles) {
        const int64_t last = first + x.segment_tiles < tiles ? first + x.segment_tiles : tiles;
        int32_t sums[kTileOutputs] = {};
        for (int64_t t = first; t < last; t += at_once) {
            const int64_t count = last - t < at_once ? last - t : at_once;
            decode(packed + t * tile_bytes(bits), count, decoded);
            decoded_product<SignedLevels, PairDot>(decoded, count, {x.data + t * kTileInputs, 0, 1}, sums);
        }
        add_segment(sums, x.scales[segment], y);
    }
}

template <int bits>
void segmented_levels(const TileRows& rows, const SegmentedRow& x, float* y) {
    if (holds_lowest(x.data, rows.tiles * kTileInputs)) return row_by_row<bits, decoded_row<bits, decode_tiles<SignedDecoder<bits>>>>(rows, x, y);
    row_by_row<bits, segment_product<SignedDecoder<bits>, PairDot>>(rows, x, y);
}

template <int bits>
void segmented_strands(const TileRows& rows, const SegmentedRow& x, float* y) {
    if (holds_lowest(x.data, rows.tiles * kTileInputs)) return row_by_row<bits, decoded_row<bits, decode_strands<SignedDecoder<bits>>>>(rows, x, y);
    row_by_row<bits, strand_row<SignedDecoder<bits>, PairDot>>(rows, x, y);
}

}  // namespace

const KernelTable kAvx2Kernels = {
    "avx2", 0, kFusedRows,
    {decode_tiles<SplitDecoder>, decode_tiles<SignedDecoder<6>>, decode_tiles<SignedDecoder<7>>, decode_tiles<SignedDecoder<8>>,
     decode_strands<SignedDecoder<6>>, decode_strands<SignedDecoder<7>>, decode_strands<SignedDecoder<8>>},
    {packed_product<SplitDecoder, PairDot>, packed_levels<6>, packed_levels<7>, packed_levels<8>},
    {nullptr, segmented_levels<6>, segmented_levels<7>, segmented_levels<8>, segmented_strands<6>, segmented_strands<7>, segmented_strands<8>},
    add_decoded<SignedLevels, PairDot>,
    decoded_product<SignedLevels, PairDot>, row_product_with<WideRow>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_avx2,
    &kAvx2ModelSteps,
};

}  // namespace septet
