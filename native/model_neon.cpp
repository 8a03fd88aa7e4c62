// The steps of model_table.h for NEON: plain vector code, so only the flags of this file differ.
#include "model_steps.h"

namespace septet {

const ModelSteps kNeonModelSteps = kModelSteps;

}  // namespace septet
