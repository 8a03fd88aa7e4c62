// The class Layer of the Python module, and what its functions share.
#pragma once
#include "arrays.h"

#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <array>
#include <optional>

namespace septet {

using Optional = std::optional<AnyArray>;

inline size_t ceil_of(int64_t a, int64_t b) { return static_cast<size_t>((a + b - 1) / b); }

inline std::string bits_text(int bits) { return std::to_string(bits) + " bits per pair"; }

inline int64_t bytes_of_tile(int bits) {
    if (bits < 6 || bits > 8) raise("OptionError", "bits per pair must be 6, 7 or 8", std::to_string(bits), "choose 3.0, 3.5 or 4.0 bits per weight");
    return 16 * bits;
}

// A layer whose arrays were checked once; keeps them alive.
class Layer {
public:
    // sizes: code, bits, in_features, out_features, input_block, output_block, group_size, segment, as in septet_layer.
    Layer(AnyArray weight, AnyArray scale, Optional offset, Optional input_scale, const std::array<int64_t, 8>& sizes)
        : arrays_{std::move(weight), std::move(scale)}, offset_(std::move(offset)), input_scale_(std::move(input_scale)) {
        const auto [code, bits, k, n, input_block, output_block, group_size, segment] = sizes;
        const int64_t rows = static_cast<int64_t>(ceil_of(n, 64)), columns = static_cast<int64_t>(ceil_of(k, 4));
        layer_ = {static_cast<int>(code), static_cast<int>(bits), k, n, nullptr, nullptr, nullptr, nullptr, input_block, output_block, group_size, segment, nullptr};
        if (code == SEPTET_INT8) layer_.weight = view<int8_t>(arrays_[0], "weight", {n, k});
        else layer_.weight = view<uint8_t>(arrays_[0], "packed weights", {rows, columns * bytes_of_tile(static_cast<int>(bits))});
        if (code == SEPTET_SPLIT) {
            const int64_t scale_rows = group_size == 0 ? 2 : 2 * static_cast<int64_t>(ceil_of(columns * 4, group_size));
            layer_.scale = view<float>(arrays_[1], "transposed scales", {scale_rows, rows * 64});
            if (offset_) layer_.offset = view<float>(*offset_, "transposed offsets", {scale_rows, rows * 64});
        } else {
            layer_.scale = view<float>(arrays_[1], "scale", {n});
        }
        if (input_scale_) layer_.input_scale = view<float>(*input_scale_, "input_scale", {k});
    }

    // Dense weights of an engine: float32 [N, K], or uint16 with the bits of float16 or bfloat16.
    Layer(AnyArray weight, const std::string& dtype) : arrays_{std::move(weight), {}} {
        const int code = dtype == "float32" ? SEPTET_FLOAT32 : dtype == "float16" ? SEPTET_FLOAT16 : dtype == "bfloat16" ? SEPTET_BFLOAT16 : -1;
        if (code < 0) raise("OptionError", "dense weights must be float32, float16 or bfloat16", dtype, "convert them");
        const void* data = code == SEPTET_FLOAT32 ? static_cast<const void*>(view<float>(arrays_[0], "weight", {kAny, kAny}))
                                                  : view<uint16_t>(arrays_[0], "weight", {kAny, kAny});
        layer_ = {code, 16, size_of(arrays_[0], 1), size_of(arrays_[0], 0), data, nullptr, nullptr, nullptr, 1, 1, 0, 0, nullptr};
    }

    const septet_layer& stored() const { return layer_; }

    // The same layer with its weights in another array of as many bytes, see septet_arrange.
    Layer arranged(const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& weight) const {
        if (arrays_[0].nbytes() != weight.nbytes()) raise("ShapeError", "arranged weights must have as many bytes as the weights", describe(AnyArray(weight)), "check the sizes");
        Layer layer(*this);
        run([&] { return septet_arrange(&layer.layer_, weight.data()); }, "weights of code " + std::to_string(layer_.code));
        layer.arrays_[0] = AnyArray(weight);
        return layer;
    }

    nb::object linear(const AnyArray& x, bool float_activations, int threads) const {
        const float* data = view<float>(x, "inputs", {kAny, layer_.in_features});
        Result<float> out({x.shape(0), static_cast<size_t>(layer_.out_features)});
        const int kind = float_activations ? SEPTET_ACTIVATIONS_FLOAT : SEPTET_ACTIVATIONS_INT8;
        run([&] { return septet_linear(&layer_, data, size_of(x, 0), kind, out.data, threads); }, describe(x));
        return out.array;
    }

private:
    AnyArray arrays_[2];
    Optional offset_, input_scale_;
    septet_layer layer_;
};

// Adds the class Engine.
void bind_engine(nb::module_& m);

}  // namespace septet
