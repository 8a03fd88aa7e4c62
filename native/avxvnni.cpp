// AVX2 with AVX-VNNI and GFNI: vpdpbusd adds up the four products of a lane. See avx2_steps.h.
//
// The unsigned operand is level + 128, the signed one the activations, so callers start sums at -128 * sum(x).
#include "avx2_strands.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

constexpr int kBias = 128;

inline __m256i biased(__m256i v) { return _mm256_xor_si256(v, _mm256_set1_epi8(-kBias)); }

template <int bits>
struct BiasedDecoder : TrellisDecoder<bits> {
    static constexpr int32_t bias = kBias;
    static __m256i decoded(const SignedBytes& levels) { return biased(_mm256_sign_epi8(levels.magnitude, levels.sign)); }
    static __m256i weights(const SignedBytes& levels) { return decoded(levels); }
    static __m256i inputs(const SignedBytes&, __m256i four) { return four; }
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
