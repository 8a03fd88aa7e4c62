// AVX-512 with VBMI and VNNI: the decoding loop the format was made for.
//
// A step is 32 pairs, 16 outputs. vpermb hands each 64-bit lane the bytes of 4 windows, vpmultishiftqb cuts the windows out, two 16-bit multiplications
// hash them, vpermi2b looks up both levels of each pair in a table of two registers (it ignores the eighth index bit), and vpdpbusd sums the four inputs
// of an output. The unsigned operand is level + 128, the signed one the activations, so callers start sums at -128 * sum(x).
#include "avx512_strands.h"
#include "model_steps.h"
#include "viterbi_kernel.h"

namespace septet {
namespace {

constexpr int kSteps = 4, kWindowsPerLane = 4;

// A tile in registers. Every step finds its bytes in one of them; all loads stay inside the tile.
template <int bits>
struct Tile {
    __m512i first, middle, last, wrapped;

    explicit Tile(const uint8_t* tile)
        : first(_mm512_loadu_si512(tile)), middle(bits == 8 ? _mm512_loadu_si512(tile + 32) : first), last(_mm512_loadu_si512(tile + tile_bytes(bits) - 64)),
          wrapped(_mm512_alignr_epi32(first, last, 1)) {}

    __m512i source(int step) const { return step == 0 ? first : step == 1 ? middle : step == 2 ? last : wrapped; }
    static constexpr int source_begin(int step) { return step == 0 ? 0 : step == 1 ? (bits == 8 ? 32 : 0) : tile_bytes(bits) - (step == 2 ? 64 : 60); }
};

// Which byte of its source each byte of a step comes from.
template <int bits>
constexpr Bytes gather(int step) {
    Bytes index{};
    for (int lane = 0; lane < 8; lane++)
        for (int j = 0; j < 8; j++) {
            const int byte = (32 * step + kWindowsPerLane * lane) * bits / 8 + j - Tile<bits>::source_begin(step);
            index.at[lane * 8 + j] = static_cast<uint8_t>(byte < 64 ? byte : 63);  // beyond the windows of its lane, so any byte will do
        }
    return index;
}

// Where each result byte begins in its lane, in bits: `first` and `second` bits after the begin of its window.
template <int bits>
constexpr Bytes shifts(int first, int second) {
    Bytes shift{};
    for (int i = 0; i < 64; i++) {
        const int lane = i / 8, window = i / 2 % kWindowsPerLane, begin = kWindowsPerLane * lane * bits % 8 + window * bits;
        shift.at[i] = static_cast<uint8_t>(begin + (i % 2 ? second : first));
    }
    return shift;
}

template <int bits>
constexpr Bytes kGather[kSteps] = {gather<bits>(0), gather<bits>(1), gather<bits>(2), gather<bits>(3)};

template <int width>
struct TrellisDecoder {
    static constexpr int bits = width;
    static constexpr Bytes kShift = shifts<bits>(0, 8);
    const __m512i index[kSteps] = {load(kGather<bits>[0]), load(kGather<bits>[1]), load(kGather<bits>[2]), load(kGather<bits>[3])};
    const __m512i shift = load(kShift);
    const LevelTable<bits> table;

    // Levels + 128 of 16 outputs.
    __m512i decode(const Tile<bits>& tile, int step) const {
        return table.levels(_mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(index[step], tile.source(step))));
    }
};

struct SplitDecoder {
    static constexpr int bits = 7;
    static constexpr Bytes kShift = shifts<bits>(0, 4);
    const __m512i index[kSteps] = {load(kGather<bits>[0]), load(kGather<bits>[1]), load(kGather<bits>[2]), load(kGather<bits>[3])};
    const __m512i shift = load(kShift), mask = _mm512_set1_epi16(0x070F);

    __m512i decode(const Tile<bits>& tile, int step) const {
        return _mm512_and_si512(mask, _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(index[step], tile.source(step))));
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

template <class Decoder>
[[gnu::flatten]] void packed_product(const uint8_t* packed, int64_t tiles, Rows x, int32_t* sums) {
    const Decoder decoder;
    in_blocks<kFusedRows>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value;
        const int8_t* input = x.data + first * x.stride;
        int32_t* y = sums + first * kTileOutputs;
        __m512i sum[rows][kSteps], four[rows];
        repeat<rows, kSteps>([&](auto r, auto step) { sum[r][step] = _mm512_loadu_si512(y + r * kTileOutputs + 16 * step); });
        const uint8_t* at = packed;
        for (int64_t t = 0; t < tiles; t++, at += tile_bytes(Decoder::bits), input += kTileInputs) {
            prefetch_tile(at);
            const Tile<Decoder::bits> tile(at);
            repeat<rows>([&](auto r) { four[r] = broadcast_four(input + r * x.stride); });
            repeat<kSteps>([&](auto step) {
                const __m512i levels = decoder.decode(tile, step);
                repeat<rows>([&](auto r) { add_dots(sum[r][step], levels, four[r]); });
            });
        }
        repeat<rows, kSteps>([&](auto r, auto step) { _mm512_storeu_si512(y + r * kTileOutputs + 16 * step, sum[r][step]); });
    });
}

// Short segments would spend their time on storing sums and fetching them again, so everything stays in registers from the first to the last.
// Two rows of tiles side by side are two streams from memory, which fetch more than one does.
template <class Decoder, int rows>
[[gnu::flatten]] void rows_product(const TileRows& w, const SegmentedRow& x, float* y) {
    constexpr int bytes = tile_bytes(Decoder::bits);
    const Decoder decoder;
    __m512 total[rows][kSteps];
    repeat<rows, kSteps>([&](auto row, auto step) { total[row][step] = _mm512_setzero_ps(); });
    const int8_t* input = x.data;
    const uint8_t* at = w.packed;
    const int64_t stride = w.tiles * bytes;
    for (int64_t segment = 0, first = 0; first < w.tiles; segment++, first += x.segment_tiles) {
        const int64_t last = first + x.segment_tiles < w.tiles ? first + x.segment_tiles : w.tiles;
        const __m512i bias = _mm512_set1_epi32(-kBias * (x.sums[2 * segment] + x.sums[2 * segment + 1]));
        __m512i sum[rows][kSteps];
        repeat<rows, kSteps>([&](auto row, auto step) { sum[row][step] = bias; });
        for (int64_t t = first; t < last; t++, at += bytes, input += kTileInputs) {
            const __m512i four = broadcast_four(input);
            repeat<rows>([&](auto row) {
                prefetch_tile_twice(at + row * stride, (w.tiles - t) * bytes, (rows - 1) * stride);
                const Tile<Decoder::bits> tile(at + row * stride);
                repeat<kSteps>([&](auto step) { add_dots(sum[row][step], decoder.decode(tile, step), four); });
            });
        }
        const __m512 scale = _mm512_set1_ps(x.scales[segment]);
        repeat<rows, kSteps>([&](auto row, auto step) {
            total[row][step] = _mm512_add_ps(total[row][step], _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum[row][step])));
        });
    }
    repeat<rows, kSteps>([&](auto row, auto step) { _mm512_storeu_ps(y + row * kTileOutputs + 16 * step, total[row][step]); });
}

template <class Decoder>
void segment_product(const TileRows& w, const SegmentedRow& x, float* y) {
    TileRows rest = w;
    for (; rest.count > 1; rest.count -= 2, rest.packed += 2 * rest.tiles * tile_bytes(Decoder::bits), y += 2 * kTileOutputs)
        rows_product<Decoder, 2>(rest, x, y);
    if (rest.count == 1) rows_product<Decoder, 1>(rest, x, y);
}

// sum[r][q] += decoded tiles @ rows of activations. Plain loops: GCC 12 keeps sums that lambdas refer to in memory as well, at half the speed.
template <int rows>
[[gnu::always_inline]] inline void add_tiles(const uint8_t* decoded, int64_t tiles, const int8_t* x, int64_t x_stride, __m512i (&sum)[rows][4]) {
    for (int64_t t = 0; t < tiles; t++, decoded += kTileWeights, x += kTileInputs) {
        __m512i level[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) level[q] = _mm512_loadu_si512(decoded + 64 * q);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const __m512i four = broadcast_four(x + r * x_stride);
#pragma GCC unroll 4
            for (int q = 0; q < 4; q++) add_dots(sum[r][q], level[q], four);
        }
    }
}

void decoded_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    in_blocks<6>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value;
        int32_t* y = sums + first * kTileOutputs;
        __m512i sum[rows][4];
#pragma GCC unroll 24
        for (int i = 0; i < 4 * rows; i++) sum[i / 4][i % 4] = _mm512_loadu_si512(y + 16 * i);
        add_tiles<rows>(decoded, tiles, x.data + first * x.stride, x.stride, sum);
#pragma GCC unroll 24
        for (int i = 0; i < 4 * rows; i++) _mm512_storeu_si512(y + 16 * i, sum[i / 4][i % 4]);
    });
}

void add_decoded(const uint8_t* decoded, int64_t tiles, const SegmentedRows& rows_of, float* y) {
    const Rows& x = rows_of.x;
    in_blocks<6>(x.count, [&](auto row_count, int64_t first) {
        constexpr int rows = decltype(row_count)::value;
        __m512i sum[rows][4];
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            const int32_t* of_x = rows_of.sums + (first + r) * 2 * rows_of.step;
            sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = _mm512_set1_epi32(-kBias * (of_x[0] + of_x[1]));
        }
        add_tiles<rows>(decoded, tiles, x.data + first * x.stride, x.stride, sum);
#pragma GCC unroll 24
        for (int i = 0; i < 4 * rows; i++) {
            float* at = y + first * kTileOutputs + 16 * i;
            const __m512 scale = _mm512_set1_ps(rows_of.scales[(first + i / 4) * rows_of.step]);
            _mm512_storeu_ps(at, _mm512_add_ps(_mm512_loadu_ps(at), _mm512_mul_ps(scale, _mm512_cvtepi32_ps(sum[i / 4][i % 4]))));
        }
    });
}

// Weight + 128 is the unsigned operand.
struct BiasedDot {
    static constexpr int inputs = 64;
    static constexpr int32_t bias = kBias;
    static __m512i activations(uint64_t valid, const int8_t* x) { return _mm512_maskz_loadu_epi8(valid, x); }
    static __m512i weights(uint64_t valid, const int8_t* w) { return _mm512_xor_si512(_mm512_maskz_loadu_epi8(valid, w), _mm512_set1_epi8(-128)); }
    static __m512i add_product(__m512i sum, __m512i w, __m512i x) {
        add_dots(sum, w, x);
        return sum;
    }
};

}  // namespace

const KernelTable kAvx512VbmiKernels = {
    "avx512vbmi", kBias, kFusedRows,
    {decode_tiles<SplitDecoder>, decode_tiles<TrellisDecoder<6>>, decode_tiles<TrellisDecoder<7>>, decode_tiles<TrellisDecoder<8>>,
     decode_strands<6>, decode_strands<7>, decode_strands<8>},
    {packed_product<SplitDecoder>, packed_product<TrellisDecoder<6>>, packed_product<TrellisDecoder<7>>, packed_product<TrellisDecoder<8>>},
    {nullptr, segment_product<TrellisDecoder<6>>, segment_product<TrellisDecoder<7>>, segment_product<TrellisDecoder<8>>,
     strands_product<6>, strands_product<7>, strands_product<8>},
    add_decoded,
    decoded_product, row_product_with<BiasedDot>, widen, rescale, float_product, float_row_product,
    multiply, hadamard, quantize, pair_sums, add_segment, add_split, read_sum,
    &viterbi_avx512,
    &kModelSteps,
    {tokens_product<6>, tokens_product<7>, tokens_product<8>},
};

}  // namespace septet
