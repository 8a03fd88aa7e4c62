// The steps of model_table.h for any machine: for the plain kernels, and for NEON, which every AArch64 processor has.
#include "model_steps.h"

namespace septet {

const ModelSteps kPlainModelSteps = kModelSteps;

}  // namespace septet
