// The C functions about activations, products and whole layers; the layers themselves are in layers.cpp.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "layers.h"
#include "products.h"

namespace septet {
namespace {

constexpr int64_t kTokensAtOnce = 256;  // bounds the intermediate results of a layer

// Runs product(target) with target [tokens][padded], then drops the padding: y [tokens][outputs].
template <class Product>
void without_padding(int64_t tokens, int64_t outputs, int64_t padded, float* y, const Product& product) {
    if (outputs == padded) return product(y);
    Array<float> wide = make_array<float>(tokens * padded);
    product(wide.get());
    for (int64_t m = 0; m < tokens; m++) std::copy_n(wide.get() + m * padded, outputs, y + m * outputs);
}

int check_split(const septet_tiles* tiles, const septet_split_scales* scales, int64_t out_features) {
    if (const int error = check_tiles(tiles)) return error;
    if (tiles->bits != 7) return SEPTET_ERROR_BITS;
    if (scales == nullptr || scales->scale == nullptr) return SEPTET_ERROR_NULL;
    if (scales->group_size < kTileInputs || scales->group_size % kTileInputs != 0) return SEPTET_ERROR_GROUP;
    const int64_t padded = tiles->rows * kTileOutputs;
    return out_features <= padded - kTileOutputs || out_features > padded ? SEPTET_ERROR_SIZE : SEPTET_OK;
}

void run_layer(const KernelTable& kernels, const Layer& layer, const float* x, int64_t tokens, bool as_float, float* y, int threads) {
    const septet_layer& stored = layer.stored;
    Array<float> rotated = make_array<float>(tokens * layer.inputs);
    Array<int8_t> values = as_float ? nullptr : make_array<int8_t>(tokens * layer.inputs);
    Array<float> scales = as_float ? nullptr : make_array<float>(tokens * layer.segments());
    const PreparedInputs inputs{rotated.get(), values.get(), scales.get()};
    const Part whole{0, stored.out_features, stored.output_block};
    const Finishing finishing{&whole, 1, stored.scale};
    prepare_inputs(kernels, layer, x, tokens, as_float, inputs, threads);
    without_padding(tokens, stored.out_features, layer.outputs, y, [&](float* target) {
        multiply_inputs(kernels, layer, inputs, tokens, as_float, finishing, target, threads);
    });
    if (stored.code != SEPTET_TRELLIS || tokens == 1) return;
    parallel_for(worthwhile_threads(threads, stored.out_features * 16, tokens), tokens, [&](int64_t first, int64_t last) {
        for (int64_t m = first; m < last; m++) finishing.finish(kernels, 0, stored.out_features, y + m * stored.out_features);
    });
}

}  // namespace
}  // namespace septet

using namespace septet;

extern "C" {

int septet_read_sum(const uint8_t* data, int64_t bytes, uint64_t* sum, int threads) {
    if (bytes < 0) return SEPTET_ERROR_SIZE;
    if (sum == nullptr || (bytes > 0 && data == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        constexpr int64_t block = 1 << 16;  // numbers
        const int64_t count = bytes / 8;
        const uint64_t* numbers = reinterpret_cast<const uint64_t*>(data);
        std::atomic<uint64_t> total{0};
        for (int64_t i = count * 8; i < bytes; i++) total += data[i];
        parallel_for(workers, ceil_divide(count, block), [&](int64_t first, int64_t last) {
            total += kernels.read_sum(numbers + first * block, std::min(last * block, count) - first * block);
        }, kMostParts);
        *sum = total;
        return SEPTET_OK;
    });
}

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
        trellis_sums(kernels, Matrix(*tiles, kTrellis6), values, tokens, sums, workers);
        return SEPTET_OK;
    });
}

int septet_trellis_product(const septet_tiles* tiles, const septet_activations* x, float* y, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (const int error = check_activations(x, tiles->columns * kTileInputs)) return error;
    if (y == nullptr && x->tokens > 0) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        trellis_product(kernels, Matrix(*tiles, kTrellis6), *x, y, workers);
        return SEPTET_OK;
    });
}

int septet_trellis_product_float(const septet_tiles* tiles, const float* x, int64_t tokens, float* y, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (!fits(tokens, tiles->columns * kTileInputs)) return SEPTET_ERROR_SIZE;
    if (tokens > 0 && (x == nullptr || y == nullptr)) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        const Matrix w(*tiles, kTrellis6);
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
        const Matrix w(*tiles, kSplit7);
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
        const Matrix w(*tiles, kSplit7);
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

int septet_arrange(septet_layer* layer, void* weight) {
    if (const int error = check_layer(layer, false)) return error;
    if (weight == nullptr) return SEPTET_ERROR_NULL;
    return with_kernels(1, [&](const KernelTable& kernels, int) {
        layer->arranged_for = copy_weights(&kernels, *layer, weight);
        layer->weight = weight;
        return SEPTET_OK;
    });
}

int septet_linear(const septet_layer* layer, const float* x, int64_t tokens, int activations, float* y, int threads) {
    if (const int error = check_layer(layer, false)) return error;
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
