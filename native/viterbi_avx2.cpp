// Viterbi step with 8 lanes.
#include <immintrin.h>

#include <algorithm>

#include "viterbi_kernel.h"

namespace septet {
namespace {

struct Avx2 {
    using Type = __m256i;
    static constexpr int lanes = 8, registers_per_tile = 2;
    static Type all(int32_t v) { return _mm256_set1_epi32(v); }
    static Type load(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static void store(int32_t* p, Type v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
    static void store_low_bytes(uint8_t* p, Type v) {
        const __m256i first = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
        const __m256i bytes = _mm256_shuffle_epi8(v, first);
        const __m128i packed = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(p), packed);
    }
    static Type add(Type a, Type b) { return _mm256_add_epi32(a, b); }
    static Type subtract(Type a, Type b) { return _mm256_sub_epi32(a, b); }
    static Type min(Type a, Type b) { return _mm256_min_epi32(a, b); }
    static Type bit_and(Type a, Type b) { return _mm256_and_si256(a, b); }
    static Type bit_or(Type a, Type b) { return _mm256_or_si256(a, b); }
    static Type metric(Type cost, Type input, Type level) {
        return _mm256_add_epi32(cost, _mm256_madd_epi16(_mm256_add_epi16(input, _mm256_srai_epi16(level, 7)), level));
    }
    static Type times_groups(int c, int groups) {
        return _mm256_mullo_epi32(_mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), all(c)), all(groups));
    }
    static int32_t reduce_min(Type v) {
        alignas(32) int32_t lane[8];
        store(lane, v);
        return *std::min_element(lane, lane + 8);
    }
};

}  // namespace

const ViterbiKernel viterbi_avx2 = viterbi_kernel<Avx2>();

}  // namespace septet
