// Viterbi step with 4 lanes.
#include <arm_neon.h>

#include <cstring>

#include "viterbi_kernel.h"

namespace septet {
namespace {

struct Neon {
    using Type = int32x4_t;
    static constexpr int lanes = 4, registers_per_tile = 4;
    static Type all(int32_t v) { return vdupq_n_s32(v); }
    static Type load(const int32_t* p) { return vld1q_s32(p); }
    static void store(int32_t* p, Type v) { vst1q_s32(p, v); }
    static void store_low_bytes(uint8_t* p, Type v) {
        const uint16x4_t words = vmovn_u32(vreinterpretq_u32_s32(v));
        const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
        std::memcpy(p, &bytes, 4);
    }
    static Type add(Type a, Type b) { return vaddq_s32(a, b); }
    static Type subtract(Type a, Type b) { return vsubq_s32(a, b); }
    static Type min(Type a, Type b) { return vminq_s32(a, b); }
    static Type bit_and(Type a, Type b) { return vandq_s32(a, b); }
    static Type bit_or(Type a, Type b) { return vorrq_s32(a, b); }
    static Type metric(Type cost, Type input, Type level) {
        const int16x8_t y = vreinterpretq_s16_s32(level), x = vaddq_s16(vreinterpretq_s16_s32(input), vshrq_n_s16(y, 7));
        return vaddq_s32(cost, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
    }
    static Type times_groups(int c, int groups) {
        constexpr int32_t lane[4] = {0, 1, 2, 3};
        return vmulq_n_s32(vaddq_s32(vld1q_s32(lane), all(c)), groups);
    }
    static int32_t reduce_min(Type v) { return vminvq_s32(v); }
};

}  // namespace

const ViterbiKernel viterbi_neon = viterbi_kernel<Neon>();

}  // namespace septet
