// The dot product of the sets neon-dotprod and neon-i8mm: sdot is exact for every int8.
#pragma once
#include "neon_steps.h"

namespace septet {
namespace {

struct FourDot {
    static int32x4_t add_levels(int32x4_t sum, int8x16_t levels, int8x16_t x) { return vdotq_s32(sum, levels, x); }
    static int32x4_t add_any(int32x4_t sum, int8x16_t w, int8x16_t x) { return vdotq_s32(sum, w, x); }
};

}  // namespace
}  // namespace septet
