// What differs between instruction sets: one table of functions per set. Everything else is written once, in products.cpp and pipeline.cpp.
//
// A decoded tile is 256 bytes [64 outputs][4 inputs]: the fields of the split code as they are, the levels of the trellis code plus the table's level_bias.
// Products add to int32 sums with wrap-around, so a caller that starts them at -level_bias * sum(x) gets the exact product.
// Each set lives in a file of its own, compiled with its own flags; such a file must not share inline functions with others (anonymous namespaces only).
#pragma once
#include <cstdint>

namespace septet {

struct ModelSteps;
struct ViterbiKernel;

constexpr int kTileOutputs = 64, kTileInputs = 4, kTilePairs = 128, kTileWeights = 256;
constexpr int tile_bytes(int bits) { return kTilePairs / 8 * bits; }

// How the stream of a tile becomes fields or levels. Strands: trellis tiles arranged in groups of four (arrange.h), so kernels begin and end between groups;
// a set may have no kernels for them (nullptr).
enum Decoding { kSplit7, kTrellis6, kTrellis7, kTrellis8, kStrands6, kStrands7, kStrands8, kDecodings };
constexpr int kGroupTiles = 4;

// Activations: `count` rows, `stride` elements apart.
struct Rows { const int8_t* data; int64_t stride; int64_t count; };
struct FloatRows { const float* data; int64_t stride; int64_t count; };

// One group of the split code at 64 outputs; offset[0] == nullptr: symmetric. Index 0 is even inputs, 1 odd ones.
struct SplitGroup { const float* scale[2]; const float* offset[2]; };

// Activations of one token in segments of whole tiles (the last may be shorter): their sums over even and odd inputs, and their scales.
struct SegmentedRow { const int8_t* data; int64_t segment_tiles; const int32_t* sums; const float* scales; };

using DecodeTiles = void (*)(const uint8_t* packed, int64_t tiles, uint8_t* decoded);
// sums [x.count][64] += decoded tiles @ x.
using PackedProduct = void (*)(const uint8_t* packed, int64_t tiles, Rows x, int32_t* sums);

// Neighbouring rows of tiles; packed rows follow each other.
struct TileRows { const uint8_t* packed; int64_t count, tiles; };

constexpr int kStreams = 4;  // rows of tiles that a kernel reads side by side, at most

// y[rows.count * 64] = from 0, per segment in order: y + scale * float32(decoded tiles @ x), the level_bias taken off.
using SegmentProduct = void (*)(const TileRows& rows, const SegmentedRow& x, float* y);

// Decoded tiles of one segment and some tokens: sums and scales lie `step` segments apart from token to token.
struct SegmentedRows { Rows x; const int32_t* sums; const float* scales; int64_t step; };

// y [x.count][64] = y + scale * float32(decoded @ x, the level_bias taken off), for one segment.
using AddSegment = void (*)(const uint8_t* decoded, int64_t tiles, const SegmentedRows& x, float* y);

// A row of tiles in strands for some tokens, all segments: y[m*y_stride + 64] as SegmentProduct. x.sums and x.scales begin at the first segment.
using TokensProduct = void (*)(const TileRows& row, int64_t segment_tiles, const SegmentedRows& x, float* y, int64_t y_stride);
constexpr int kFusedTokens = 4;  // most tokens for which that is faster than decoding into a buffer

struct KernelTable {
    const char* name;
    int level_bias;        // 0: decoded levels are int8; 128: they are uint8, level + 128
    int64_t fused_rows;    // most rows packed_product takes; 0: there is none

    DecodeTiles decode[kDecodings];
    PackedProduct packed_product[kDecodings];
    SegmentProduct segment_product[kDecodings];  // nullptr: there is none
    AddSegment add_decoded;                      // of trellis levels; nullptr: there is none
    // sums [x.count][64] += decoded @ x, any number of rows.
    void (*decoded_product)(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums);
    // sums [x.count][rows] = weight [rows][features] @ x.
    void (*row_product)(const int8_t* weight, int64_t rows, int64_t features, Rows x, int32_t* sums);

    // values [4*tiles][64] = float32(uint8(decoded + shift) - zero[input & 1]).
    void (*widen)(const uint8_t* decoded, int64_t tiles, uint8_t shift, const int32_t* zero, float* values);
    // values = values * scale + offset, in place.
    void (*rescale)(float* values, int64_t tiles, const SplitGroup& group);
    // sums [x.count][64] += values [inputs][64] @ x, in any order of inputs that does not depend on x.count.
    void (*float_product)(const float* values, int64_t inputs, FloatRows x, float* sums);
    // sums [x.count][rows] = weight @ x.
    void (*float_row_product)(const int8_t* weight, int64_t rows, int64_t features, FloatRows x, float* sums);

    void (*multiply)(const float* a, const float* b, int64_t count, float* out);
    void (*hadamard)(float* x, int64_t count, int64_t block);
    float (*quantize)(const float* x, int64_t count, int8_t* q);  // returns the scale
    void (*pair_sums)(const int8_t* x, int64_t count, int32_t* sums);  // sums of even and odd positions; count is even
    // y[64] = y + scale * float32(sums).
    void (*add_segment)(const int32_t* sums, float scale, float* y);
    // One group of the split product at 64 outputs; sums: [2][64] over even and odd inputs, x_sums: XE and XO.
    void (*add_split)(const int32_t* sums, const int32_t* x_sums, const SplitGroup& group, float scale, float* y);

    uint64_t (*read_sum)(const uint64_t* data, int64_t count);

    const ViterbiKernel* viterbi;
    const ModelSteps* model;
    TokensProduct tokens_product[3] = {};  // of kStrands6 to kStrands8; nullptr: there is none
};

extern const KernelTable kScalarKernels;
extern const ModelSteps kPlainModelSteps;
#if defined(SEPTET_X86)
extern const KernelTable kAvx2Kernels, kAvx512Kernels, kAvx512VbmiKernels;
extern const ModelSteps kAvx2ModelSteps;
#endif
#if defined(SEPTET_AVX_VNNI)
extern const KernelTable kAvxVnniKernels;
#endif
#if defined(SEPTET_AMX)
extern const KernelTable kAmxKernels;
#endif
#if defined(SEPTET_ARM64)
extern const KernelTable kNeonKernels, kNeonDotprodKernels, kNeonI8mmKernels;
#endif

// The table in use, or nullptr and an error number (septet.h) when SEPTET_CPU cannot be obeyed. In dispatch.cpp.
const KernelTable* active_kernels(int* error);

}  // namespace septet
