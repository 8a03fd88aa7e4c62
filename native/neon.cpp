// NEON of any AArch64 processor: products as int16, added up in pairs. See neon_steps.h.
#include "neon_steps.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

struct LongDot {
    // 2 * 127 * 128 fits int16: levels never are -128.
    static int32x4_t add_levels(int32x4_t sum, int8x16_t levels, int8x16_t x) {
        return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(levels), vget_low_s8(x)), vmull_high_s8(levels, x)));
    }
    static int32x4_t add_any(int32x4_t sum, int8x16_t w, int8x16_t x) {
        return vpadalq_s16(vpadalq_s16(sum, vmull_s8(vget_low_s8(w), vget_low_s8(x))), vmull_high_s8(w, x));
    }
};

}  // namespace

const KernelTable kNeonKernels = {
    "neon", 0, kFusedRows,
    {decode_tiles<SplitDecoder>, decode_tiles<TrellisDecoder<6>>, decode_tiles<TrellisDecoder<7>>, decode_tiles<TrellisDecoder<8>>},
    {packed_product<SplitDecoder, LongDot>, packed_product<TrellisDecoder<6>, LongDot>, packed_product<TrellisDecoder<7>, LongDot>,
     packed_product<TrellisDecoder<8>, LongDot>},
    {nullptr, nullptr, nullptr, nullptr},
    nullptr,
    decoded_product<LongDot>, row_product<LongDot>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_neon,
    &kPlainModelSteps,
};

}  // namespace septet
