// The steps of model_table.h for AVX2 (and AVX-VNNI, which changes nothing about them): plain vector code, so only the flags of this file differ.
#include "model_steps.h"

namespace septet {

const ModelSteps kAvx2ModelSteps = kModelSteps;

}  // namespace septet
