// Weights arranged for the two AVX2 sets, products with one token and decoding: windows are two shifts and an `or` instead of shuffles.
//
// arrange.h puts four tiles side by side: `bits` registers of 32 words, in word i of a lane the i-th 16 bits of an eighth of a tile's stream, a strand. Half a
// register is 16 strands: its 128-bit lanes have strand k of the four tiles, then strand k + 4. Step q decodes pair q of each: output 8*k + q/2, inputs
// 2*(q%2) and the next, and a 32-bit lane sums them over two tiles. Few operations wait for each other, so more of them run at once than in the stored order.
//
// All hashes of a group are computed before any is looked up. It is more than 30 cycles from a load to a sum: step by step, operations that wait would fill
// the processor's scheduler, and those that could run would not get in.
#pragma once
#include "avx2_decoded.h"
#include "strand_steps.h"

namespace septet {
namespace {

constexpr int kOutputsOfStrand = 8, kRegisterBytes = 64, kHalfBytes = 32, kHalfSteps = 16;
template <int bits> constexpr int kGroupBytes = kGroupTiles * tile_bytes(bits);

// What follows the last word of each strand of a half: the first word of the next one; the last strand goes on where the first begins.
template <int half>
[[gnu::always_inline]] inline __m256i after_strands(const uint8_t* group) {
    if constexpr (half == 0) return load_any(group + kHalfBytes / 2);
    else return _mm256_permute2x128_si256(load_any(group + kHalfBytes), _mm256_shuffle_epi32(load_any(group), 0x4E), 0x21);
}

template <int bits, int half, int step>
[[gnu::always_inline]] inline __m256i strand_window(const uint8_t* group, __m256i after) {
    constexpr int word = step * bits / 16, shift = step * bits % 16;
    const uint8_t* at = group + kRegisterBytes * word + kHalfBytes * half;
    if constexpr (shift == 0) return load_any(at);
    else {
        const __m256i next = word + 1 < bits ? load_any(at + kRegisterBytes) : after;
        return _mm256_or_si256(_mm256_srli_epi16(load_any(at), shift), _mm256_slli_epi16(next, 16 - shift));
    }
}

// uint16 [half of the registers][step][strand and tile].
struct alignas(32) GroupHashes { uint8_t at[2][kHalfSteps][kHalfBytes]; };

// Inlined, GCC would move hashes to where they are looked up.
template <class Decoder>
[[gnu::noinline, gnu::flatten]] void hash_group(const uint8_t* group, GroupHashes& hashes) {
    const Decoder decoder;
    const __m256i after[2] = {after_strands<0>(group), after_strands<1>(group)};
    for (int i = 0; i < Decoder::bits; i++) prefetch_ahead(group + kRegisterBytes * i);
    repeat<2, kHalfSteps>([&](auto half, auto step) {
        store_any(hashes.at[half][step], decoder.hash_of(strand_window<Decoder::bits, half, step>(group, after[half])));
    });
}

// sums [half][8 outputs][8] += a group. Two steps are all inputs of an output; `even` and `odd` are the two inputs of each tile that they multiply.
// Inlined, GCC would know that nothing else points to sums, and move them into registers that are not there.
template <class Decoder, class Dot>
[[gnu::noinline, gnu::flatten]] void add_group(const GroupHashes& hashes, const int8_t* input, int32_t* sums) {
    const Decoder decoder;
    const __m256i pairs = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(input)), _mm256_broadcastsi128_si256(order_of_inputs()));
    const __m256i even = _mm256_unpacklo_epi64(pairs, pairs), odd = _mm256_unpackhi_epi64(pairs, pairs);
    repeat<2, kOutputsOfStrand>([&](auto half, auto output) {
        int32_t* to = sums + half * kTileOutputs + 8 * output;
        const auto first = decoder.levels(load_any(hashes.at[half][2 * output]));
        const auto last = decoder.levels(load_any(hashes.at[half][2 * output + 1]));
        const __m256i sum = Dot::add(load_any(to), decoder.weights(first), decoder.inputs(first, even));
        store_any(to, Dot::add(sum, decoder.weights(last), decoder.inputs(last, odd)));
    });
}

// A row of tiles in strands.
template <class Decoder, class Dot>
void strand_row(const uint8_t* packed, int64_t tiles, const SegmentedRow& x, float* y) {
    constexpr int half_outputs = kTileOutputs / 2;
    alignas(32) float total[kTileOutputs] = {};  // [half][output / 2][lane]
    for (int64_t segment = 0, first = 0; first < tiles; segment++, first += x.segment_tiles) {
        const int64_t last = first + x.segment_tiles < tiles ? first + x.segment_tiles : tiles;
        alignas(32) int32_t sums[2 * kTileOutputs] = {};  // [half][output][lane], two lanes for each strand
        for (int64_t t = first; t < last; t += kGroupTiles) {
            GroupHashes hashes;
            hash_group<Decoder>(packed + t * tile_bytes(Decoder::bits), hashes);
            add_group<Decoder, Dot>(hashes, x.data + t * kTileInputs, sums);
        }
        const __m256i excess = _mm256_set1_epi32(-Decoder::bias * (x.sums[2 * segment] + x.sums[2 * segment + 1]));
        const __m256 scale = _mm256_set1_ps(x.scales[segment]);
        for (int i = 0; i < kTileOutputs; i += 8) {
            const __m256i exact = _mm256_add_epi32(excess, _mm256_hadd_epi32(load_any(sums + 2 * i), load_any(sums + 2 * i + 8)));
            _mm256_store_ps(total + i, _mm256_add_ps(_mm256_load_ps(total + i), _mm256_mul_ps(scale, _mm256_cvtepi32_ps(exact))));
        }
    }
    // hadd leaves in every 128-bit lane strands k and k + 4 of an even output, then of the odd one after it
    for (int i = 0; i < kTileOutputs; i++) {
        const int half = i / half_outputs, lane = i % 8, strand = 2 * half + lane / 4 + lane % 2 * 4;
        y[kOutputsOfStrand * strand + i % half_outputs / 8 * 2 + lane / 2 % 2] = total[i];
    }
}

// [upper half of the strands' outputs][strand k or k + 4][tile]: four outputs, of which each comes from two steps.
template <class Decoder>
[[gnu::flatten]] void decode_half(const Decoder& decoder, const GroupHashes& hashes, int half, uint8_t* decoded) {
    __m256i four[2][2][kGroupTiles];
    repeat<2, 4>([&](auto upper, auto m) {
        constexpr int step = 8 * upper + 2 * m;
        const __m256i first = decoder.decoded(decoder.levels(load_any(hashes.at[half][step])));
        const __m256i last = decoder.decoded(decoder.levels(load_any(hashes.at[half][step + 1])));
        four[upper][0][m] = _mm256_unpacklo_epi16(first, last);
        four[upper][1][m] = _mm256_unpackhi_epi16(first, last);
    });
    for (int i = 0; i < 4; i++) transpose_dwords(four[i / 2][i % 2]);
    for (int i = 0; i < 2 * kGroupTiles; i++) {
        const __m256i lower = four[0][i % 2][i / 2], upper = four[1][i % 2][i / 2];
        uint8_t* to = decoded + kTileWeights * (i / 2) + kTileInputs * kOutputsOfStrand * (2 * half + i % 2 * 4);
        store_any(to, _mm256_permute2x128_si256(lower, upper, 0x20));
        store_any(to + kTileInputs * kOutputsOfStrand, _mm256_permute2x128_si256(lower, upper, 0x31));
    }
}

template <class Decoder>
void decode_strands(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    const Decoder decoder;
    for (int64_t t = 0; t < tiles; t += kGroupTiles, packed += kGroupBytes<Decoder::bits>, decoded += kGroupTiles * kTileWeights) {
        GroupHashes hashes;
        hash_group<Decoder>(packed, hashes);
        for (int half = 0; half < 2; half++) decode_half(decoder, hashes, half, decoded);
    }
}

}  // namespace
}  // namespace septet
