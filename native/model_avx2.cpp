// The steps of model_table.h for AVX2, with VNNI or without: plain vector code, so only the flags of this file differ.
#include "model_steps.h"

namespace septet {

const ModelSteps kAvx2ModelSteps = kModelSteps;

}  // namespace septet
