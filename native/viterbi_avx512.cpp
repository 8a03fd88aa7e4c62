// Viterbi step with 16 lanes; needs AVX-512 F, BW, VL, DQ and VNNI (vpdpwssd).
#include <immintrin.h>

#include "viterbi_kernel.h"

namespace septet {
namespace {

struct Avx512 {
    using Type = __m512i;
    static constexpr int lanes = 16, registers_per_tile = 4;
    static Type all(int32_t v) { return _mm512_set1_epi32(v); }
    static Type load(const int32_t* p) { return _mm512_load_si512(p); }
    static void store(int32_t* p, Type v) { _mm512_store_si512(p, v); }
    static void store_low_bytes(uint8_t* p, Type v) { _mm_store_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
    static Type add(Type a, Type b) { return _mm512_add_epi32(a, b); }
    static Type subtract(Type a, Type b) { return _mm512_sub_epi32(a, b); }
    static Type min(Type a, Type b) { return _mm512_min_epi32(a, b); }
    static Type bit_and(Type a, Type b) { return _mm512_and_si512(a, b); }
    static Type bit_or(Type a, Type b) { return _mm512_or_si512(a, b); }
    static Type metric(Type cost, Type input, Type level) {
        return _mm512_dpwssd_epi32(cost, _mm512_add_epi16(input, _mm512_srai_epi16(level, 7)), level);
    }
    static Type times_groups(int c, int groups) {
        const Type index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return _mm512_mullo_epi32(_mm512_add_epi32(index, all(c)), all(groups));
    }
    static int32_t reduce_min(Type v) { return _mm512_reduce_min_epi32(v); }
};

}  // namespace

const ViterbiKernel viterbi_avx512 = viterbi_kernel<Avx512>();

}  // namespace septet
