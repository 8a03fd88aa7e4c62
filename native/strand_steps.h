// What the orders of arrange.h have in common on x86, for registers of 256 and of 512 bits: inputs in the order of steps, and transposition.
//
// Included by avx2_strands.h and avx512_strands.h, once per instruction set; the branch for registers that a set lacks is never instantiated.
#pragma once
#include <immintrin.h>

namespace septet {
namespace {

// Where the 16 inputs of a group of tiles go: of all tiles the first two, for even steps, then the last two.
inline __m128i order_of_inputs() { return _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15); }

// Each of these works in every 128-bit lane by itself.
template <class Register>
[[gnu::always_inline]] inline Register unpack_low_dwords(Register a, Register b) {
    if constexpr (sizeof(Register) == 64) return _mm512_unpacklo_epi32(a, b);
    else return _mm256_unpacklo_epi32(a, b);
}
template <class Register>
[[gnu::always_inline]] inline Register unpack_high_dwords(Register a, Register b) {
    if constexpr (sizeof(Register) == 64) return _mm512_unpackhi_epi32(a, b);
    else return _mm256_unpackhi_epi32(a, b);
}
template <class Register>
[[gnu::always_inline]] inline Register unpack_low_qwords(Register a, Register b) {
    if constexpr (sizeof(Register) == 64) return _mm512_unpacklo_epi64(a, b);
    else return _mm256_unpacklo_epi64(a, b);
}
template <class Register>
[[gnu::always_inline]] inline Register unpack_high_qwords(Register a, Register b) {
    if constexpr (sizeof(Register) == 64) return _mm512_unpackhi_epi64(a, b);
    else return _mm256_unpackhi_epi64(a, b);
}

// v[i] becomes the 32-bit lanes i of the four.
template <class Register>
[[gnu::always_inline]] inline void transpose_dwords(Register (&v)[4]) {
    const Register a = unpack_low_dwords(v[0], v[1]), b = unpack_high_dwords(v[0], v[1]);
    const Register c = unpack_low_dwords(v[2], v[3]), d = unpack_high_dwords(v[2], v[3]);
    v[0] = unpack_low_qwords(a, c);
    v[1] = unpack_high_qwords(a, c);
    v[2] = unpack_low_qwords(b, d);
    v[3] = unpack_high_qwords(b, d);
}

}  // namespace
}  // namespace septet
