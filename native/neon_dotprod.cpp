// NEON with the dot product instructions: sdot adds up the four products of a lane. See neon_steps.h.
#include "neon_dot.h"
#include "viterbi_kernel.h"

namespace septet {

const KernelTable kNeonDotprodKernels = {
    "neon-dotprod", 0, kFusedRows,
    {decode_tiles<SplitDecoder>, decode_tiles<TrellisDecoder<6>>, decode_tiles<TrellisDecoder<7>>, decode_tiles<TrellisDecoder<8>>},
    {packed_product<SplitDecoder, FourDot>, packed_product<TrellisDecoder<6>, FourDot>, packed_product<TrellisDecoder<7>, FourDot>,
     packed_product<TrellisDecoder<8>, FourDot>},
    {nullptr, nullptr, nullptr, nullptr},
    nullptr,
    decoded_product<FourDot>, row_product<FourDot>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_neon,
    &kPlainModelSteps,
};

}  // namespace septet
