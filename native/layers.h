// One linear layer in three steps: its inputs rotated and quantized, the product of its code, its outputs rotated and scaled.
#pragma once
#include "checks.h"
#include "products.h"

namespace septet {

// Weights as they are, for the engine only; `bits` and the scales are ignored, and neither inputs nor outputs are rotated.
inline bool is_dense(int code) { return code == SEPTET_FLOAT32 || code == SEPTET_FLOAT16 || code == SEPTET_BFLOAT16; }
inline bool is_tiled(int code) { return code == SEPTET_SPLIT || code == SEPTET_TRELLIS; }

// A checked layer, and how its sizes round up to tiles.
struct Layer {
    const septet_layer& stored;
    int64_t inputs, outputs, segment;

    explicit Layer(const septet_layer& layer);
    // Whose kernels read the weights, which are in strands then; nullptr: they are as stored.
    const KernelTable* arranged_for() const { return static_cast<const KernelTable*>(stored.arranged_for); }
    septet_tiles tiles() const { return {static_cast<const uint8_t*>(stored.weight), outputs / kTileOutputs, inputs / kTileInputs, stored.bits}; }
    septet_rows rows() const { return {static_cast<const int8_t*>(stored.weight), stored.scale, stored.out_features, stored.in_features}; }
    septet_split_scales split_scales() const { return {stored.scale, stored.offset, segment}; }
    Matrix matrix() const { return Matrix(tiles(), stored.code == SEPTET_SPLIT ? kSplit7 : arranged_for() == nullptr ? kTrellis6 : kStrands6); }
    int64_t segments() const { return ceil_divide(inputs, segment); }
};

// Bytes of the weights of a layer.
int64_t weight_bytes(const septet_layer& layer);
// Copies the weights, in the order that kernels (nullptr: any) have for them unless they are arranged already; returns the new `arranged_for`.
const void* copy_weights(const KernelTable* kernels, const septet_layer& layer, void* weight);

// An error number of septet.h; dense layers only where `dense_too`.
int check_layer(const septet_layer* layer, bool dense_too);
int check_rows(const septet_rows* weight);

// The inputs of a product: [tokens][layer.inputs], and [tokens][layer.segments()] scales. values and scales stay empty for float activations.
struct PreparedInputs {
    float* rotated;
    int8_t* values;
    float* scales;
};

void quantize_rows(const KernelTable& kernels, const float* x, int64_t features, const septet_activations& shape, int8_t* values, float* scales, int threads);

// x: [tokens][in_features].
void prepare_inputs(const KernelTable& kernels, const Layer& layer, const float* x, int64_t tokens, bool as_float, const PreparedInputs& inputs, int threads);
// y: [tokens][layer.outputs]. Outputs of a trellis layer are finished if there is one token; those of several are finished by whoever reads them next, while
// they are in a cache. Arranged weights are read by the kernels that they were arranged for.
void multiply_inputs(const KernelTable& active, const Layer& layer, const PreparedInputs& inputs, int64_t tokens, bool as_float, const Finishing& finishing,
                     float* y, int threads);

}  // namespace septet
