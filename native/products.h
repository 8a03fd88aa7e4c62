// Products of activations with packed tiles and with rows of int8, for one layer; the same loops for every instruction set.
#pragma once
#include <cstdint>

#include "checks.h"
#include "kernel_table.h"

namespace septet {

// A packed matrix and how to read it.
struct Matrix {
    const uint8_t* packed;
    int64_t rows, columns;
    Decoding decoding;

    // kTrellis6 and kStrands6 are followed by those of 7 and 8 bits.
    Matrix(const septet_tiles& tiles, Decoding code) : packed(tiles.packed), rows(tiles.rows), columns(tiles.columns), decoding(with_bits(code, tiles.bits)) {}
    static Decoding with_bits(Decoding code, int bits) { return code == kSplit7 ? kSplit7 : static_cast<Decoding>(code + bits - 6); }
    int bits() const { return decoding == kSplit7 ? 7 : 6 + (decoding - kTrellis6) % 3; }
    int64_t inputs() const { return columns * kTileInputs; }
    int64_t outputs() const { return rows * kTileOutputs; }
    const uint8_t* tile(int64_t row, int64_t column) const { return packed + (row * columns + column) * tile_bytes(bits()); }
};

// Outputs of one of the layers that are stored as one matrix: they begin at `offset`; a trellis layer rotates them in blocks.
struct Part { int64_t offset, outputs, block; };

// What makes outputs of a trellis layer's sums: the rotations of its `count` parts, and float32 [outputs], a scale for each output.
struct Finishing {
    const Part* parts;
    int64_t count;
    const float* scale;

    // Whether neighbouring outputs can be finished without the others, in ranges that begin at multiples of `step`.
    bool goes_in_steps(int64_t step) const;
    // Outputs first .. last - 1 of one token, y: float32 [outputs], in place.
    void finish(const KernelTable& kernels, int64_t first, int64_t last, float* y) const;
};

// Results are float32 [tokens, w.outputs()] (int8: [tokens, rows]); every element is written.
// True when outputs have been finished on the way, while they were in a cache: for a single token, with `finishing`, and by some loops only.
bool trellis_product(const KernelTable& kernels, const Matrix& w, const septet_activations& x, float* y, int threads, const Finishing* finishing = nullptr);
void trellis_sums(const KernelTable& kernels, const Matrix& w, const int8_t* values, int64_t tokens, int32_t* sums, int threads);
void split_product(const KernelTable& kernels, const Matrix& w, const septet_split_scales& scales, const septet_activations& x, float* y, int threads);
// scales nullptr: trellis.
void float_product(const KernelTable& kernels, const Matrix& w, const septet_split_scales* scales, FloatRows x, float* y, int threads);
void row_product(const KernelTable& kernels, const septet_rows& w, const septet_activations& x, float* y, int threads);
void float_row_product(const KernelTable& kernels, const septet_rows& w, FloatRows x, float* y, int threads);

// A dense weight of the engine, as stored: y [tokens][out_features].
void dense_product(const KernelTable& kernels, const septet_layer& layer, FloatRows x, float* y, int threads);

// As many threads as are worth waking for a product of this many weights and tokens.
int worthwhile_threads(int threads, int64_t weights, int64_t tokens);

}  // namespace septet
