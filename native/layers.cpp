#include "layers.h"

#include <algorithm>
#include <cstring>

#include "arrange.h"
#include "model_table.h"

namespace septet {
namespace {

// rotated [tokens][inputs] = H(input_scale * x), padded with 0.
void transform_inputs(const KernelTable& kernels, const Layer& layer, const float* x, int64_t tokens, float* rotated, int threads) {
    const septet_layer& stored = layer.stored;
    parallel_for(threads, tokens, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; m++) {
            const float* from = x + m * stored.in_features;
            float* to = rotated + m * layer.inputs;
            if (stored.input_scale == nullptr) std::copy_n(from, stored.in_features, to);
            else kernels.multiply(from, stored.input_scale, stored.in_features, to);
            if (stored.input_block > 1) kernels.hadamard(to, stored.in_features, stored.input_block);
            std::fill(to + stored.in_features, to + layer.inputs, 0.0f);
        }
    });
}

void multiply_float(const KernelTable& kernels, const Layer& layer, FloatRows x, float* y, int threads) {
    if (layer.stored.code == SEPTET_INT8) return float_row_product(kernels, layer.rows(), x, y, threads);
    const septet_split_scales scales = layer.split_scales();
    float_product(kernels, layer.matrix(), layer.stored.code == SEPTET_SPLIT ? &scales : nullptr, x, y, threads);
}

void multiply_int8(const KernelTable& kernels, const Layer& layer, const septet_activations& x, float* y, int threads) {
    if (layer.stored.code == SEPTET_INT8) return row_product(kernels, layer.rows(), x, y, threads);
    split_product(kernels, layer.matrix(), layer.split_scales(), x, y, threads);
}

}  // namespace

Layer::Layer(const septet_layer& layer) : stored(layer) {
    const bool tiled = is_tiled(layer.code);
    inputs = tiled ? ceil_divide(layer.in_features, kTileInputs) * kTileInputs : layer.in_features;
    outputs = tiled ? ceil_divide(layer.out_features, kTileOutputs) * kTileOutputs : layer.out_features;
    segment = layer.code == SEPTET_SPLIT ? layer.group_size : layer.code == SEPTET_TRELLIS ? layer.segment : 0;
    if (segment == 0 || segment > inputs) segment = inputs;
}

int64_t weight_bytes(const septet_layer& layer) {
    if (is_dense(layer.code)) return layer.out_features * layer.in_features * float_bytes(layer.code == SEPTET_FLOAT32 ? kFloat32 : kFloat16);
    const Layer sizes(layer);
    return is_tiled(layer.code) ? sizes.outputs * sizes.inputs / kTileWeights * tile_bytes(layer.bits) : layer.out_features * layer.in_features;
}

const void* copy_weights(const KernelTable* kernels, const septet_layer& layer, void* weight) {
    constexpr int64_t group = kGroupTiles * kTileInputs;
    const int64_t bytes = weight_bytes(layer);
    const Layer sizes(layer);
    const bool in_groups = layer.code == SEPTET_TRELLIS && sizes.inputs % group == 0 && sizes.segment % group == 0;
    if (in_groups && layer.arranged_for == nullptr && kernels != nullptr && kernels->decode[kStrands6] != nullptr) {
        arrange_strands(static_cast<const uint8_t*>(layer.weight), bytes / tile_bytes(layer.bits), layer.bits, static_cast<uint8_t*>(weight));
        return kernels;
    }
    std::memcpy(weight, layer.weight, static_cast<size_t>(bytes));
    return layer.arranged_for;
}

int check_rows(const septet_rows* weight) {
    if (weight == nullptr || weight->weight == nullptr || weight->scale == nullptr) return SEPTET_ERROR_NULL;
    const bool good = weight->rows >= 1 && weight->features >= 1 && weight->features <= kMaxInputs && fits(weight->rows, weight->features);
    return good ? SEPTET_OK : SEPTET_ERROR_SIZE;
}

int check_layer(const septet_layer* layer, bool dense_too) {
    if (layer == nullptr || layer->weight == nullptr) return SEPTET_ERROR_NULL;
    const bool dense = dense_too && is_dense(layer->code);
    if (!dense && layer->scale == nullptr) return SEPTET_ERROR_NULL;
    if (!dense && !is_tiled(layer->code) && layer->code != SEPTET_INT8) return SEPTET_ERROR_CODE;
    if (layer->in_features < 1 || layer->in_features > kMaxInputs || layer->out_features < 1 || layer->segment < 0) return SEPTET_ERROR_SIZE;
    if (!is_block(layer->input_block, layer->in_features) || !is_block(layer->output_block, layer->out_features)) return SEPTET_ERROR_BLOCK;
    if (layer->code != SEPTET_TRELLIS && layer->output_block != 1) return SEPTET_ERROR_BLOCK;
    if (layer->code == SEPTET_SPLIT && (layer->group_size < 0 || layer->group_size % kTileInputs != 0)) return SEPTET_ERROR_GROUP;
    if (!fits(layer->out_features, layer->in_features)) return SEPTET_ERROR_SIZE;  // before sizes are rounded up
    if (dense) return layer->input_block == 1 ? SEPTET_OK : SEPTET_ERROR_SIZE;
    const Layer sizes(*layer);
    const septet_rows rows = sizes.rows();
    if (layer->code == SEPTET_INT8) return check_rows(&rows);
    const septet_tiles tiles = sizes.tiles();
    return layer->code == SEPTET_SPLIT && layer->bits != 7 ? SEPTET_ERROR_BITS : check_tiles(&tiles);
}

void quantize_rows(const KernelTable& kernels, const float* x, int64_t features, const septet_activations& shape, int8_t* values, float* scales, int threads) {
    const int64_t segments = ceil_divide(features, shape.segment);
    parallel_for(threads, shape.tokens, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; m++)
            for (int64_t s = 0; s < segments; s++) {
                const int64_t at = m * features + s * shape.segment, count = std::min(shape.segment, features - s * shape.segment);
                scales[m * segments + s] = kernels.quantize(x + at, count, values + at);
            }
    });
}

void prepare_inputs(const KernelTable& kernels, const Layer& layer, const float* x, int64_t tokens, bool as_float, const PreparedInputs& inputs, int threads) {
    const int around = worthwhile_threads(threads, layer.inputs * 16, tokens);  // the steps around the product cost some 16 weights an element
    transform_inputs(kernels, layer, x, tokens, inputs.rotated, around);
    if (as_float || is_dense(layer.stored.code)) return;
    quantize_rows(kernels, inputs.rotated, layer.inputs, {nullptr, nullptr, tokens, layer.segment}, inputs.values, inputs.scales, around);
}

void multiply_inputs(const KernelTable& active, const Layer& layer, const PreparedInputs& inputs, int64_t tokens, bool as_float, const Finishing& finishing,
                     float* y, int threads) {
    const KernelTable& kernels = layer.arranged_for() == nullptr ? active : *layer.arranged_for();
    const FloatRows x{inputs.rotated, layer.inputs, tokens};
    const septet_activations values{inputs.values, inputs.scales, tokens, layer.segment};
    if (is_dense(layer.stored.code)) return dense_product(kernels, layer.stored, x, y, threads);
    const bool trellis = layer.stored.code == SEPTET_TRELLIS;
    bool finished = false;
    if (as_float) multiply_float(kernels, layer, x, y, threads);
    else if (trellis) finished = trellis_product(kernels, layer.matrix(), values, y, threads, tokens == 1 ? &finishing : nullptr);
    else multiply_int8(kernels, layer, values, y, threads);
    if (trellis && tokens == 1 && !finished) finishing.finish(kernels, 0, layer.outputs, y);
}

}  // namespace septet
