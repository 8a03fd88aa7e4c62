// AVX-512 without VBMI and VNNI (F, BW, VL, DQ): decode to a buffer, then multiply with vpmaddubsw.
//
// A step is 32 pairs, 16 outputs, one per 32-bit lane. Four outputs are `bits` bytes, so vpermd brings each 128-bit lane its dwords, vpshufb each 32-bit
// lane its bytes, and a shift its two windows. The level table is 64 words in two registers: vpermi2w finds the word, a shift the byte.
#include "avx512_steps.h"
#include "model_steps.h"
#include "tables.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

constexpr int kSteps = 4;

struct alignas(64) Bytes { uint8_t at[64]; };
struct alignas(64) Words { uint32_t at[16]; };
inline __m512i load(const Bytes& bytes) { return _mm512_load_si512(bytes.at); }
inline __m512i load(const Words& words) { return _mm512_load_si512(words.at); }

// A tile in registers, as in avx512vbmi.cpp; every source begins at a whole dword of the step.
template <int bits>
struct Tile {
    __m512i first, middle, last, wrapped;

    explicit Tile(const uint8_t* tile)
        : first(_mm512_loadu_si512(tile)), middle(bits == 8 ? _mm512_loadu_si512(tile + 32) : first), last(_mm512_loadu_si512(tile + tile_bytes(bits) - 64)),
          wrapped(_mm512_alignr_epi32(first, last, 1)) {}

    __m512i source(int step) const { return step == 0 ? first : step == 1 ? middle : step == 2 ? last : wrapped; }
    static constexpr int source_begin(int step) { return step == 0 ? 0 : step == 1 ? (bits == 8 ? 32 : 0) : tile_bytes(bits) - (step == 2 ? 64 : 60); }
};

// Which dword of its source each dword of a step comes from: lane L begins at byte 4*bits*step + bits*L, rounded down.
template <int bits>
constexpr Words dwords(int step) {
    Words index{};
    for (int i = 0; i < 16; i++) {
        const int dword = (4 * bits * step - Tile<bits>::source_begin(step) + bits * (i / 4) / 4 * 4) / 4 + i % 4;
        index.at[i] = static_cast<uint32_t>(dword < 16 ? dword : 15);  // beyond the windows of its lane
    }
    return index;
}

template <int bits>
constexpr Words kDwords[kSteps] = {dwords<bits>(0), dwords<bits>(1), dwords<bits>(2), dwords<bits>(3)};

// The 4 bytes from where the first window of each output begins, and the bit it begins at.
template <int bits>
constexpr Bytes output_bytes() {
    Bytes index{};
    for (int i = 0; i < 64; i++) index.at[i] = static_cast<uint8_t>(bits * (i / 16) % 4 + 2 * bits * (i / 4 % 4) / 8 + i % 4);
    return index;
}
template <int bits>
constexpr Words output_shifts() {
    Words shift{};
    for (int i = 0; i < 16; i++) shift.at[i] = static_cast<uint32_t>(2 * bits * (i % 4) % 8);
    return shift;
}

template <int width>
struct Windows {
    static constexpr int bits = width;
    static constexpr Bytes kBytes = output_bytes<bits>();
    static constexpr Words kShifts = output_shifts<bits>();
    const __m512i index[kSteps] = {load(kDwords<bits>[0]), load(kDwords<bits>[1]), load(kDwords<bits>[2]), load(kDwords<bits>[3])};
    const __m512i bytes = load(kBytes), shifts = load(kShifts);

    // 32 windows as words.
    __m512i cut(const Tile<bits>& tile, int step) const {
        const __m512i lanes = _mm512_shuffle_epi8(_mm512_permutexvar_epi32(index[step], tile.source(step)), bytes);
        const __m512i first = _mm512_srlv_epi32(lanes, shifts);
        return _mm512_mask_blend_epi16(0xAAAAAAAA, first, _mm512_slli_epi32(first, 16 - bits));
    }
};

template <int width>
struct TrellisDecoder : Windows<width> {
    static constexpr const TrellisTable& kTable = kTrellisTables[width - 6];
    const __m512i low = _mm512_loadu_si512(kTable.levels), high = _mm512_loadu_si512(kTable.levels + 64);
    const __m512i c_low = _mm512_set1_epi16(static_cast<int16_t>(kTable.multiplier & 0xFFFF)), c_high = _mm512_set1_epi16(static_cast<int16_t>(kTable.multiplier >> 16));
    const __m512i eight = _mm512_set1_epi16(8);

    // Levels of 16 outputs: bits 0 .. 6 of a hash for the first weight of a pair, 8 .. 14 for the second.
    __m512i decode(const Tile<width>& tile, int step) const {
        const __m512i window = this->cut(tile, step);
        const __m512i hash = _mm512_add_epi16(_mm512_mulhi_epu16(window, c_low), _mm512_mullo_epi16(window, c_high));
        const __m512i first = _mm512_permutex2var_epi16(low, _mm512_srli_epi16(hash, 1), high);
        const __m512i second = _mm512_permutex2var_epi16(low, _mm512_srli_epi16(hash, 9), high);
        // An odd index is the upper byte of its word. The first level goes to the lower byte, the second to the upper one.
        const __m512i down = _mm512_and_si512(_mm512_slli_epi16(hash, 3), eight), up = _mm512_andnot_si512(_mm512_srli_epi16(hash, 5), eight);
        return _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, _mm512_srlv_epi16(first, down), _mm512_sllv_epi16(second, up));
    }
};

struct SplitDecoder : Windows<7> {
    const __m512i first = _mm512_set1_epi16(0x000F), second = _mm512_set1_epi16(0x0700);

    __m512i decode(const Tile<7>& tile, int step) const {
        const __m512i window = cut(tile, step);
        return _mm512_or_si512(_mm512_and_si512(window, first), _mm512_and_si512(_mm512_slli_epi16(window, 4), second));
    }
};

template <class Decoder>
void decode_tiles(const uint8_t* packed, int64_t tiles, uint8_t* decoded) {
    const Decoder decoder;
    for (int64_t t = 0; t < tiles; t++, packed += tile_bytes(Decoder::bits), decoded += kTileWeights) {
        prefetch_tile(packed);
        const Tile<Decoder::bits> tile(packed);
        for (int step = 0; step < kSteps; step++) _mm512_storeu_si512(decoded + 64 * step, decoder.decode(tile, step));
    }
}

// vpmaddubsw wants an unsigned operand: |x|, with its sign given to the levels. 2 * 128 * 127 fits int16, so nothing saturates.
[[gnu::flatten]] void decoded_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    const __m512i ones = _mm512_set1_epi16(1), zero = _mm512_setzero_si512();
    in_blocks<4>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value;
        const int8_t* input = x.data + first * x.stride;
        int32_t* y = sums + first * kTileOutputs;
        __m512i sum[rows][4], level[4];
        repeat<rows, 4>([&](auto r, auto q) { sum[r][q] = _mm512_loadu_si512(y + r * kTileOutputs + 16 * q); });
        for (int64_t t = 0; t < tiles; t++) {
            repeat<4>([&](auto q) { level[q] = _mm512_loadu_si512(decoded + t * kTileWeights + 64 * q); });
            repeat<rows>([&](auto r) {
                const __m512i four = broadcast_four(input + r * x.stride + t * kTileInputs), magnitude = _mm512_abs_epi8(four);
                const __mmask64 negative = _mm512_movepi8_mask(four);
                repeat<4>([&](auto q) {
                    const __m512i pairs = _mm512_maddubs_epi16(magnitude, _mm512_mask_sub_epi8(level[q], negative, zero, level[q]));
                    sum[r][q] = _mm512_add_epi32(sum[r][q], _mm512_madd_epi16(pairs, ones));
                });
            });
        }
        repeat<rows, 4>([&](auto r, auto q) { _mm512_storeu_si512(y + r * kTileOutputs + 16 * q, sum[r][q]); });
    });
}

// Both operands as int16: exact for every int8.
struct WideDot {
    static constexpr int inputs = 32;
    static constexpr int32_t bias = 0;
    static __m512i wide(uint64_t valid, const int8_t* x) { return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>(valid), x)); }
    static __m512i activations(uint64_t valid, const int8_t* x) { return wide(valid, x); }
    static __m512i weights(uint64_t valid, const int8_t* w) { return wide(valid, w); }
    static __m512i add_product(__m512i sum, __m512i w, __m512i x) { return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x)); }
};

}  // namespace

const KernelTable kAvx512Kernels = {
    "avx512", 0, 0,
    {decode_tiles<SplitDecoder>, decode_tiles<TrellisDecoder<6>>, decode_tiles<TrellisDecoder<7>>, decode_tiles<TrellisDecoder<8>>},
    {nullptr, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr},
    nullptr,
    decoded_product, row_product_with<WideDot>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_avx2,
    &kModelSteps,
};

}  // namespace septet
