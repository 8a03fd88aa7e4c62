// AVX2 with AVX-VNNI and GFNI: vpdpbusd adds up the four products of a lane. See avx2_steps.h.
//
// The unsigned operand is level + 128, the signed one the activations, so callers start sums at -128 * sum(x).
#include "avx2_strands.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

constexpr int kBias = 128;

inline __m256i biased(__m256i v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-kBias)); }

// Magnitude i, plus 128, is the exclusive or of the first i / 16 + 1 of these tables, each at i % 16.
constexpr Bytes difference(const TrellisTable& levels, int t) {
    Bytes result = sixteen_magnitudes(levels, t);
    const Bytes before = t == 0 ? kRepeatedByte<kBias> : sixteen_magnitudes(levels, t - 1);
    for (int i = 0; i < 32; i++) result.at[i] ^= before.at[i];
    return result;
}

// vpshufb gives 0 where bit 7 of an index is set: table t joins in when index - 16*t is not negative. No vpblendvb as in avx2.cpp: Intel's processors with
// AVX-VNNI take three operations for one.
template <int bits>
struct BiasedDecoder : TrellisHash<bits> {
    using Factors = __m256i;
    using TrellisHash<bits>::kTable;
    static constexpr int32_t bias = kBias;
    static constexpr Bytes kDifferences[4] = {difference(kTable, 0), difference(kTable, 1), difference(kTable, 2), difference(kTable, 3)};
    const __m256i table[4] = {load(kDifferences[0]), load(kDifferences[1]), load(kDifferences[2]), load(kDifferences[3])};

    // Level + 128: modulo 256, -(magnitude + 128) is -magnitude + 128.
    [[gnu::always_inline]] __m256i levels(__m256i hash) const {
        const __m256i index = masked(hash, kRepeatedByte<63>);
        const __m256i first = _mm256_shuffle_epi8(table[0], index);
        const __m256i second = _mm256_shuffle_epi8(table[1], plus(index, kRepeatedByte<256 - 16>));
        const __m256i third = _mm256_shuffle_epi8(table[2], plus(index, kRepeatedByte<256 - 32>));
        const __m256i fourth = _mm256_shuffle_epi8(table[3], plus(index, kRepeatedByte<256 - 48>));
        const __m256i doubled_plus_one = _mm256_gf2p8affine_epi64_epi8(hash, _mm256_set1_epi64x(0x0001020408102040), 1);  // never 0
        return _mm256_sign_epi8(_mm256_xor_si256(_mm256_xor_si256(first, second), _mm256_xor_si256(third, fourth)), doubled_plus_one);
    }
    static __m256i weights(__m256i levels) { return levels; }
    static __m256i inputs(__m256i, __m256i four) { return four; }
    static __m256i decoded(__m256i levels) { return levels; }
};

struct VnniDot {
    // The instruction updates its operand; of the intrinsic GCC 12 makes copies of sums, to other registers and to memory.
    static __m256i add(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
        asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(unsigned_bytes), "x"(signed_bytes));
        return sum;
    }
};

struct BiasedLevels {
    static constexpr int rows = 3;
    static constexpr int32_t bias = kBias;
    __m256i four;
    void take(__m256i x) { four = x; }
    __m256i first(__m256i level) const { return level; }
    __m256i second(__m256i) const { return four; }
};

// Weight + 128 is the unsigned operand.
struct BiasedRow {
    static constexpr int inputs = 32;
    static __m256i activations(const int8_t* x) { return load_any(x); }
    static __m256i weights(const int8_t* w) { return biased(load_any(w)); }
    static __m256i add_excess(__m256i excess, __m256i x) { return VnniDot::add(excess, _mm256_set1_epi8(-kBias), x); }
    static __m256i add_product(__m256i sum, __m256i w, __m256i x) { return VnniDot::add(sum, w, x); }
};

}  // namespace

const KernelTable kAvxVnniKernels = {
    "avxvnni", kBias, kFusedRows,
    {decode_tiles<SplitDecoder>, decode_tiles<BiasedDecoder<6>>, decode_tiles<BiasedDecoder<7>>, decode_tiles<BiasedDecoder<8>>,
     decode_strands<BiasedDecoder<6>>, decode_strands<BiasedDecoder<7>>, decode_strands<BiasedDecoder<8>>},
    {packed_product<SplitDecoder, VnniDot>, packed_product<BiasedDecoder<6>, VnniDot>, packed_product<BiasedDecoder<7>, VnniDot>,
     packed_product<BiasedDecoder<8>, VnniDot>},
    {nullptr, row_by_row<6, segment_product<BiasedDecoder<6>, VnniDot>>, row_by_row<7, segment_product<BiasedDecoder<7>, VnniDot>>,
     row_by_row<8, segment_product<BiasedDecoder<8>, VnniDot>>, row_by_row<6, strand_row<BiasedDecoder<6>, VnniDot>>,
     row_by_row<7, strand_row<BiasedDecoder<7>, VnniDot>>, row_by_row<8, strand_row<BiasedDecoder<8>, VnniDot>>},
    add_decoded<BiasedLevels, VnniDot>,
    decoded_product<BiasedLevels, VnniDot>, row_product_with<BiasedRow>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_avx2,
    &kAvx2ModelSteps,
};

}  // namespace septet
