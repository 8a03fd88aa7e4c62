// The C functions about activations, products and whole layers.
#include <algorithm>
#include <cstring>

#include "products.h"

namespace septet {
namespace {

constexpr int64_t kTokensAtOnce = 256;  // bounds the intermediate results of a layer

int check_split(const septet_tiles* tiles, const septet_split_scales* scales, int64_t out_features) {
    if (const int error = check_tiles(tiles)) return error;
    if (tiles->bits != 7) return SEPTET_ERROR_BITS;
    if (scales == nullptr || scales->scale == nullptr) return SEPTET_ERROR_NULL;
    if (scales->group_size < kTileInputs || scales->group_size % kTileInputs != 0) return SEPTET_ERROR_GROUP;
    const int64_t padded = tiles->rows * kTileOutputs;
    return out_features <= padded - kTileOutputs || out_features > padded ? SEPTET_ERROR_SIZE : SEPTET_OK;
}

int check_rows(const septet_rows* weight) {
    if (weight == nullptr || weight->weight == nullptr || weight->scale == nullptr) return SEPTET_ERROR_NULL;
    const bool good = weight->rows >= 1 && weight->features >= 1 && weight->features <= kMaxInputs && fits(weight->rows, weight->features);
    return good ? SEPTET_OK : SEPTET_ERROR_SIZE;
}

// Runs product(target) with target [tokens][padded], then drops the padding: y [tokens][outputs].
template <class Product>
void without_padding(int64_t tokens, int64_t outputs, int64_t padded, float* y, const Product& product) {
    if (outputs == padded) return product(y);
    Array<float> wide = make_array<float>(tokens * padded);
    product(wide.get());
    for (int64_t m = 0; m < tokens; m++) std::copy_n(wide.get() + m * padded, outputs, y + m * outputs);
}

// A checked layer, and how its sizes round up to tiles.
struct Layer {
    const septet_layer& stored;
    int64_t inputs, outputs, segment;

    explicit Layer(const septet_layer& layer) : stored(layer) {
        const bool tiled = layer.code != SEPTET_INT8;
        inputs = tiled ? ceil_divide(layer.in_features, kTileInputs) * kTileInputs : layer.in_features;
        outputs = tiled ? ceil_divide(layer.out_features, kTileOutputs) * kTileOutputs : layer.out_features;
        segment = layer.code == SEPTET_SPLIT ? layer.group_size : layer.code == SEPTET_TRELLIS ? layer.segment : 0;
        if (segment == 0 || segment > inputs) segment = inputs;
    }
    septet_tiles tiles() const { return {static_cast<const uint8_t*>(stored.weight), outputs / kTileOutputs, inputs / kTileInputs, stored.bits}; }
    septet_rows rows() const { return {static_cast<const int8_t*>(stored.weight), stored.scale, stored.out_features, stored.in_features}; }
    septet_split_scales split_scales() const { return {stored.scale, stored.offset, segment}; }
    int64_t segments() const { return ceil_divide(inputs, segment); }
};

int check_layer(const septet_layer* layer) {
    if (layer == nullptr || layer->weight == nullptr || layer->scale == nullptr) return SEPTET_ERROR_NULL;
    if (layer->code != SEPTET_SPLIT && layer->code != SEPTET_TRELLIS && layer->code != SEPTET_INT8) return SEPTET_ERROR_CODE;
    if (layer->in_features < 1 || layer->in_features > kMaxInputs || layer->out_features < 1 || layer->segment < 0) return SEPTET_ERROR_SIZE;
    if (!is_block(layer->input_block, layer->in_features) || !is_block(layer->output_block, layer->out_features)) return SEPTET_ERROR_BLOCK;
    if (layer->code != SEPTET_TRELLIS && layer->output_block != 1) return SEPTET_ERROR_BLOCK;
    if (layer->code == SEPTET_SPLIT && (layer->group_size < 0 || layer->group_size % kTileInputs != 0)) return SEPTET_ERROR_GROUP;
    const Layer sizes(*layer);
    const septet_rows rows = sizes.rows();
    if (layer->code == SEPTET_INT8) return check_rows(&rows);
    const septet_tiles tiles = sizes.tiles();
    return layer->code == SEPTET_SPLIT && layer->bits != 7 ? SEPTET_ERROR_BITS : check_tiles(&tiles);
}

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

void multiply_float(const KernelTable& kernels, const Layer& layer, FloatRows x, float* y, int threads) {
    if (layer.stored.code == SEPTET_INT8) return float_row_product(kernels, layer.rows(), x, y, threads);
    const bool split = layer.stored.code == SEPTET_SPLIT;
    const septet_split_scales scales = layer.split_scales();
    float_product(kernels, Matrix(layer.tiles(), split), split ? &scales : nullptr, x, y, threads);
}

void multiply_int8(const KernelTable& kernels, const Layer& layer, const septet_activations& x, float* y, int threads) {
    if (layer.stored.code == SEPTET_INT8) return row_product(kernels, layer.rows(), x, y, threads);
    if (layer.stored.code == SEPTET_TRELLIS) return trellis_product(kernels, Matrix(layer.tiles(), false), x, y, threads);
    split_product(kernels, Matrix(layer.tiles(), true), layer.split_scales(), x, y, threads);
}

void run_layer(const KernelTable& kernels, const Layer& layer, const float* x, int64_t tokens, bool as_float, float* y, int threads) {
    const septet_layer& stored = layer.stored;
    const int around = worthwhile_threads(threads, layer.inputs * 16, tokens);  // the steps around the product cost some 16 weights an element
    Array<float> rotated = make_array<float>(tokens * layer.inputs);
    transform_inputs(kernels, layer, x, tokens, rotated.get(), around);
    without_padding(tokens, stored.out_features, layer.outputs, y, [&](float* target) {
        if (as_float) return multiply_float(kernels, layer, {rotated.get(), layer.inputs, tokens}, target, threads);
        Array<int8_t> values = make_array<int8_t>(tokens * layer.inputs);
        Array<float> scales = make_array<float>(tokens * layer.segments());
        const septet_activations quantized{values.get(), scales.get(), tokens, layer.segment};
        quantize_rows(kernels, rotated.get(), layer.inputs, quantized, values.get(), scales.get(), around);
        multiply_int8(kernels, layer, quantized, target, threads);
    });
    if (stored.code != SEPTET_TRELLIS) return;
    parallel_for(worthwhile_threads(threads, stored.out_features * 16, tokens), tokens, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; m++) {
            float* row = y + m * stored.out_features;
            if (stored.output_block > 1) kernels.hadamard(row, stored.out_features, stored.output_block);
            kernels.multiply(row, stored.scale, stored.out_features, row);
        }
    });
}

}  // namespace
}  // namespace septet

using namespace septet;

extern "C" {

int septet_hadamard(const float* x, int64_t tokens, int64_t features, int64_t block, float* y) {
    if (!fits(tokens, features)) return SEPTET_ERROR_SIZE;
    if (!is_block(block, features)) return SEPTET_ERROR_BLOCK;
    if (tokens * features > 0 && (x == nullptr || y == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(1, [&](const KernelTable& kernels, int) {
        if (x != y) std::copy_n(x, tokens * features, y);
        kernels.hadamard(y, tokens * features, block);
        return SEPTET_OK;
    });
}

int septet_quantize_activations(const float* x, int64_t tokens, int64_t features, int64_t segment, int8_t* values, float* scales) {
    if (!fits(tokens, features) || segment < 1) return SEPTET_ERROR_SIZE;
    if (tokens * features > 0 && (x == nullptr || values == nullptr || scales == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(1, [&](const KernelTable& kernels, int) {
        quantize_rows(kernels, x, features, {nullptr, nullptr, tokens, std::min(segment, std::max<int64_t>(features, 1))}, values, scales, 1);
        return SEPTET_OK;
    });
}

int septet_trellis_accumulate(const septet_tiles* tiles, const int8_t* values, int64_t tokens, int32_t* sums, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (!fits(tokens, tiles->columns * kTileInputs) || !fits(tokens, tiles->rows * kTileOutputs)) return SEPTET_ERROR_SIZE;
    if (tokens > 0 && (values == nullptr || sums == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        trellis_sums(kernels, Matrix(*tiles, false), values, tokens, sums, workers);
        return SEPTET_OK;
    });
}

int septet_trellis_product(const septet_tiles* tiles, const septet_activations* x, float* y, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (const int error = check_activations(x, tiles->columns * kTileInputs)) return error;
    if (y == nullptr && x->tokens > 0) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        trellis_product(kernels, Matrix(*tiles, false), *x, y, workers);
        return SEPTET_OK;
    });
}

int septet_trellis_product_float(const septet_tiles* tiles, const float* x, int64_t tokens, float* y, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (!fits(tokens, tiles->columns * kTileInputs)) return SEPTET_ERROR_SIZE;
    if (tokens > 0 && (x == nullptr || y == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        const Matrix w(*tiles, false);
        float_product(kernels, w, nullptr, {x, w.inputs(), tokens}, y, workers);
        return SEPTET_OK;
    });
}

int septet_split_product(const septet_tiles* tiles, const septet_split_scales* scales, const septet_activations* x, int64_t out_features, float* y,
                         int threads) {
    if (const int error = check_split(tiles, scales, out_features)) return error;
    if (const int error = check_activations(x, tiles->columns * kTileInputs)) return error;
    if (x->segment != scales->group_size) return SEPTET_ERROR_GROUP;
    if (y == nullptr && x->tokens > 0) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        const Matrix w(*tiles, true);
        without_padding(x->tokens, out_features, w.outputs(), y, [&](float* target) { split_product(kernels, w, *scales, *x, target, workers); });
        return SEPTET_OK;
    });
}

int septet_split_product_float(const septet_tiles* tiles, const septet_split_scales* scales, const float* x, int64_t tokens, int64_t out_features,
                               float* y, int threads) {
    if (const int error = check_split(tiles, scales, out_features)) return error;
    if (!fits(tokens, tiles->columns * kTileInputs)) return SEPTET_ERROR_SIZE;
    if (tokens > 0 && (x == nullptr || y == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        const Matrix w(*tiles, true);
        const FloatRows rows{x, w.inputs(), tokens};
        without_padding(tokens, out_features, w.outputs(), y, [&](float* target) { float_product(kernels, w, scales, rows, target, workers); });
        return SEPTET_OK;
    });
}

int septet_int8_product(const septet_rows* weight, const septet_activations* x, float* y, int threads) {
    if (const int error = check_rows(weight)) return error;
    if (const int error = check_activations(x, weight->features)) return error;
    if (x->segment < weight->features) return SEPTET_ERROR_SIZE;
    if (y == nullptr && x->tokens > 0) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        row_product(kernels, *weight, *x, y, workers);
        return SEPTET_OK;
    });
}

int septet_int8_product_float(const septet_rows* weight, const float* x, int64_t tokens, float* y, int threads) {
    if (const int error = check_rows(weight)) return error;
    if (!fits(tokens, weight->features)) return SEPTET_ERROR_SIZE;
    if (tokens > 0 && (x == nullptr || y == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        float_row_product(kernels, *weight, {x, weight->features, tokens}, y, workers);
        return SEPTET_OK;
    });
}

int septet_linear(const septet_layer* layer, const float* x, int64_t tokens, int activations, float* y, int threads) {
    if (const int error = check_layer(layer)) return error;
    if (activations != SEPTET_ACTIVATIONS_INT8 && activations != SEPTET_ACTIVATIONS_FLOAT) return SEPTET_ERROR_CODE;
    if (!fits(tokens, layer->in_features) || !fits(tokens, layer->out_features)) return SEPTET_ERROR_SIZE;
    if (tokens > 0 && (x == nullptr || y == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        const Layer sizes(*layer);
        for (int64_t first = 0; first < tokens; first += kTokensAtOnce) {
            const int64_t count = std::min(kTokensAtOnce, tokens - first);
            run_layer(kernels, sizes, x + first * layer->in_features, count, activations == SEPTET_ACTIVATIONS_FLOAT, y + first * layer->out_features, workers);
        }
        return SEPTET_OK;
    });
}

}  // extern "C"
