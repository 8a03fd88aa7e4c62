// The Python module septet._native: checks shapes, releases the interpreter's lock, calls the C functions.
#include "module_layer.h"

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace septet {
namespace {

septet_tiles tiles_of(const AnyArray& packed, int bits) {
    const int64_t bytes = bytes_of_tile(bits);
    const uint8_t* data = view<uint8_t>(packed, "packed weights", {kAny, kAny});
    if (packed.shape(0) == 0 || packed.shape(1) == 0 || size_of(packed, 1) % bytes != 0)
        raise("ShapeError", "packed weights must be uint8 [rows, columns * " + std::to_string(bytes) + "]", describe(packed), "check the bits per pair of this tensor");
    return {data, size_of(packed, 0), size_of(packed, 1) / bytes, bits};
}

int64_t positive(int64_t value, const char* name) {
    if (value < 1) raise("ShapeError", std::string(name) + " must be at least 1", std::to_string(value), "use the number of inputs for one per token");
    return value;
}

// int8 activations [M, features] and their scales [M, ceil(features/segment)].
septet_activations activations_of(const AnyArray& xq, const AnyArray& xscale, int64_t features, int64_t segment) {
    const int8_t* values = view<int8_t>(xq, "activations", {kAny, features});
    positive(segment, "a segment");
    const int64_t tokens = size_of(xq, 0), segments = static_cast<int64_t>(ceil_of(features, std::min(segment, std::max<int64_t>(features, 1))));
    return {values, view<float>(xscale, "activation scales", {tokens, segments}), tokens, segment};
}

nb::object pack(const AnyArray& symbols, int bits) {
    const int64_t bytes = bytes_of_tile(bits);
    const uint8_t* data = view<uint8_t>(symbols, "symbols", {kAny, kAny, 128});
    Result<uint8_t> out({symbols.shape(0), symbols.shape(1) * static_cast<size_t>(bytes)});
    run([&] { return septet_pack(data, size_of(symbols, 0) * size_of(symbols, 1), bits, out.data); }, bits_text(bits));
    return out.array;
}

nb::object unpack(const AnyArray& packed, int bits) {
    const septet_tiles tiles = tiles_of(packed, bits);
    Result<uint8_t> out({static_cast<size_t>(tiles.rows), static_cast<size_t>(tiles.columns), 128});
    run([&] { return septet_unpack(tiles.packed, tiles.rows * tiles.columns, bits, out.data); }, bits_text(bits));
    return out.array;
}

nb::object trellis_levels(const AnyArray& packed, int bits, int threads) {
    const septet_tiles tiles = tiles_of(packed, bits);
    Result<int8_t> out({static_cast<size_t>(tiles.rows) * 64, static_cast<size_t>(tiles.columns) * 4});
    run([&] { return septet_trellis_levels(&tiles, out.data, threads); }, describe(packed));
    return out.array;
}

nb::object split_fields(const AnyArray& packed, int threads) {
    const septet_tiles tiles = tiles_of(packed, 7);
    Result<uint8_t> out({static_cast<size_t>(tiles.rows) * 64, static_cast<size_t>(tiles.columns) * 4});
    run([&] { return septet_split_fields(&tiles, out.data, threads); }, describe(packed));
    return out.array;
}

nb::object trellis_encode(const AnyArray& fixed, int bits, int threads) {
    bytes_of_tile(bits);
    const int16_t* data = view<int16_t>(fixed, "encoder input", {kAny, 256});
    Result<uint8_t> out({fixed.shape(0), 128});
    run([&] { return septet_trellis_encode(data, size_of(fixed, 0), bits, out.data, threads); }, "a value outside -1020..1020");
    return out.array;
}

nb::object trellis_search(const AnyArray& levels, const AnyArray& fixed, int bits, int threads) {
    bytes_of_tile(bits);
    const int8_t* table = view<int8_t>(levels, "levels", {65536, 2});
    const int16_t* data = view<int16_t>(fixed, "encoder input", {kAny, 256});
    Result<uint8_t> out({fixed.shape(0), 128});
    run([&] { return septet_trellis_search(table, data, size_of(fixed, 0), bits, out.data, threads); }, "a value out of range");
    return out.array;
}

nb::object hadamard(const AnyArray& x, int64_t block) {
    const float* data = view<float>(x, "x", {kAny, kAny});
    const int64_t features = size_of(x, 1);
    if (block < 1 || (block & (block - 1)) != 0 || features % block != 0)
        raise("ShapeError", "a Hadamard block must be a power of two that divides " + std::to_string(features), std::to_string(block), "choose a smaller block");
    Result<float> out({x.shape(0), x.shape(1)});
    run([&] { return septet_hadamard(data, size_of(x, 0), features, block, out.data); }, describe(x));
    return out.array;
}

nb::object quantize_activations(const AnyArray& x, int64_t segment) {
    const float* data = view<float>(x, "x", {kAny, kAny});
    positive(segment, "a segment");
    const int64_t features = size_of(x, 1);
    Result<int8_t> values({x.shape(0), x.shape(1)});
    Result<float> scales({x.shape(0), ceil_of(features, std::min(segment, std::max<int64_t>(features, 1)))});
    run([&] { return septet_quantize_activations(data, size_of(x, 0), features, segment, values.data, scales.data); }, describe(x));
    return nb::make_tuple(values.array, scales.array);
}

nb::object trellis_accumulate(const AnyArray& packed, int bits, const AnyArray& xq, int threads) {
    const septet_tiles tiles = tiles_of(packed, bits);
    const int8_t* values = view<int8_t>(xq, "activations", {kAny, tiles.columns * 4});
    Result<int32_t> out({xq.shape(0), static_cast<size_t>(tiles.rows) * 64});
    run([&] { return septet_trellis_accumulate(&tiles, values, size_of(xq, 0), out.data, threads); }, describe(packed));
    return out.array;
}

nb::object trellis_product(const AnyArray& packed, int bits, const AnyArray& xq, const AnyArray& xscale, int64_t segment, int threads) {
    const septet_tiles tiles = tiles_of(packed, bits);
    const septet_activations x = activations_of(xq, xscale, tiles.columns * 4, segment);
    Result<float> out({xq.shape(0), static_cast<size_t>(tiles.rows) * 64});
    run([&] { return septet_trellis_product(&tiles, &x, out.data, threads); }, describe(packed));
    return out.array;
}

nb::object trellis_product_float(const AnyArray& packed, int bits, const AnyArray& x, int threads) {
    const septet_tiles tiles = tiles_of(packed, bits);
    const float* data = view<float>(x, "activations", {kAny, tiles.columns * 4});
    Result<float> out({x.shape(0), static_cast<size_t>(tiles.rows) * 64});
    run([&] { return septet_trellis_product_float(&tiles, data, size_of(x, 0), out.data, threads); }, describe(packed));
    return out.array;
}

uint64_t read_sum(const AnyArray& data, int threads) {
    const uint8_t* bytes = view<uint8_t>(data, "data", {kAny});
    if (reinterpret_cast<uintptr_t>(bytes) % sizeof(uint64_t) != 0) raise("ShapeError", "data must lie at a multiple of 8 bytes", "another place", "copy it");
    uint64_t sum = 0;
    run([&] { return septet_read_sum(bytes, size_of(data, 0), &sum, threads); }, describe(data));
    return sum;
}

// Scales as the C functions want them; `group` is cut to the padded inputs, so that one group may be written as any larger number.
struct SplitArguments {
    septet_tiles tiles;
    septet_split_scales scales;

    SplitArguments(const AnyArray& packed, const AnyArray& scale, const Optional& offset, int64_t group) : tiles(tiles_of(packed, 7)) {
        const int64_t inputs = tiles.columns * 4;
        scales.group_size = std::min(positive(group, "a group"), inputs);
        const int64_t rows = 2 * static_cast<int64_t>(ceil_of(inputs, scales.group_size));
        scales.scale = view<float>(scale, "transposed scales", {rows, tiles.rows * 64});
        scales.offset = offset ? view<float>(*offset, "transposed offsets", {rows, tiles.rows * 64}) : nullptr;
    }
    size_t outputs(int64_t out_features) const { return static_cast<size_t>(std::min(positive(out_features, "out_features"), tiles.rows * 64)); }
};

nb::object split_product(const AnyArray& packed, const AnyArray& scale, const Optional& offset, const AnyArray& xq, const AnyArray& xscale, int64_t group,
                         int64_t out_features, int threads) {
    const SplitArguments split(packed, scale, offset, group);
    const septet_activations x = activations_of(xq, xscale, split.tiles.columns * 4, split.scales.group_size);
    Result<float> out({xq.shape(0), split.outputs(out_features)});
    run([&] { return septet_split_product(&split.tiles, &split.scales, &x, out_features, out.data, threads); }, describe(packed));
    return out.array;
}

nb::object split_product_float(const AnyArray& packed, const AnyArray& scale, const Optional& offset, const AnyArray& x, int64_t group, int64_t out_features,
                               int threads) {
    const SplitArguments split(packed, scale, offset, group);
    const float* data = view<float>(x, "activations", {kAny, split.tiles.columns * 4});
    Result<float> out({x.shape(0), split.outputs(out_features)});
    run([&] { return septet_split_product_float(&split.tiles, &split.scales, data, size_of(x, 0), out_features, out.data, threads); }, describe(packed));
    return out.array;
}

septet_rows rows_of(const AnyArray& weight, const AnyArray& scale) {
    const int8_t* data = view<int8_t>(weight, "weight", {kAny, kAny});
    return {data, view<float>(scale, "scale", {size_of(weight, 0)}), size_of(weight, 0), size_of(weight, 1)};
}

nb::object int8_product(const AnyArray& weight, const AnyArray& scale, const AnyArray& xq, const AnyArray& xscale, int threads) {
    const septet_rows rows = rows_of(weight, scale);
    const septet_activations x = activations_of(xq, xscale, rows.features, std::max<int64_t>(rows.features, 1));
    Result<float> out({xq.shape(0), weight.shape(0)});
    run([&] { return septet_int8_product(&rows, &x, out.data, threads); }, describe(weight));
    return out.array;
}

nb::object int8_product_float(const AnyArray& weight, const AnyArray& scale, const AnyArray& x, int threads) {
    const septet_rows rows = rows_of(weight, scale);
    const float* data = view<float>(x, "activations", {kAny, rows.features});
    Result<float> out({x.shape(0), weight.shape(0)});
    run([&] { return septet_int8_product_float(&rows, data, size_of(x, 0), out.data, threads); }, describe(weight));
    return out.array;
}

nb::dict instruction_sets() {
    nb::dict sets;
    for (int i = 0; const char* name = septet_instruction_set_name(i); i++) sets[name] = septet_instruction_set_obstacle(i);
    return sets;
}

std::string choices() {
    std::string text = "choose one of: ";
    for (int i = 0; const char* name = septet_instruction_set_name(i); i++) {
        const std::string obstacle = septet_instruction_set_obstacle(i);
        text += (i ? ", " : "") + std::string(name) + " (" + (obstacle.empty() ? "available" : obstacle) + ")";
    }
    return text;
}

const char* instruction_set() {
    const char* name = nullptr;
    if (septet_instruction_set(&name) == SEPTET_OK) return name;
    const char* forced = std::getenv("SEPTET_CPU");
    raise("BackendUnavailableError", "SEPTET_CPU must name an instruction set that works here", forced == nullptr ? "nothing" : forced, choices().c_str());
}

void set_instruction_set(const std::optional<std::string>& name) {
    if (septet_set_instruction_set(name ? name->c_str() : nullptr) != SEPTET_OK)
        raise("BackendUnavailableError", "an instruction set must work here", *name, choices().c_str());
}

int default_threads() {
    int threads = 0;
    const char* text = std::getenv("SEPTET_THREADS");
    run([&] { return septet_default_threads(&threads); }, text == nullptr ? "nothing" : std::string("SEPTET_THREADS=") + text);
    return threads;
}

}  // namespace
}  // namespace septet

NB_MODULE(_native, m) {
    using namespace septet;
    m.doc() = "Native kernels of septet; see septet.kernels.native and include/septet.h.";
    const auto array = [](const char* name) { return nb::arg(name).noconvert(); };
    const nb::arg_v threads = nb::arg("threads") = 0;
    m.def("instruction_sets", instruction_sets);
    m.def("instruction_set", instruction_set);
    m.def("set_instruction_set", set_instruction_set, nb::arg("name").none());
    m.def("default_threads", default_threads);
    m.def("pack", pack, array("symbols"), nb::arg("bits"));
    m.def("unpack", unpack, array("packed"), nb::arg("bits"));
    m.def("trellis_levels", trellis_levels, array("packed"), nb::arg("bits"), threads);
    m.def("trellis_encode", trellis_encode, array("fixed"), nb::arg("bits"), threads);
    m.def("trellis_search", trellis_search, array("levels"), array("fixed"), nb::arg("bits"), threads);
    m.def("split_fields", split_fields, array("packed"), threads);
    m.def("hadamard", hadamard, array("x"), nb::arg("block"));
    m.def("quantize_activations", quantize_activations, array("x"), nb::arg("segment"));
    m.def("read_sum", read_sum, array("data"), threads);
    m.def("trellis_accumulate", trellis_accumulate, array("packed"), nb::arg("bits"), array("xq"), threads);
    m.def("trellis_product", trellis_product, array("packed"), nb::arg("bits"), array("xq"), array("xscale"), nb::arg("segment"), threads);
    m.def("trellis_product_float", trellis_product_float, array("packed"), nb::arg("bits"), array("x"), threads);
    m.def("split_product", split_product, array("packed"), array("scale"), array("offset").none(), array("xq"), array("xscale"), nb::arg("group"),
          nb::arg("out_features"), threads);
    m.def("split_product_float", split_product_float, array("packed"), array("scale"), array("offset").none(), array("x"), nb::arg("group"),
          nb::arg("out_features"), threads);
    m.def("int8_product", int8_product, array("weight"), array("scale"), array("xq"), array("xscale"), threads);
    m.def("int8_product_float", int8_product_float, array("weight"), array("scale"), array("x"), threads);
    nb::class_<Layer>(m, "Layer")
        .def(nb::init<AnyArray, AnyArray, Optional, Optional, const std::array<int64_t, 8>&>(), array("weight"), array("scale"), array("offset").none(),
             array("input_scale").none(), nb::arg("sizes"))
        .def(nb::init<AnyArray, const std::string&>(), array("weight"), nb::arg("dtype"))
        .def("arranged", &Layer::arranged, array("weight"))
        .def("linear", &Layer::linear, array("x"), nb::arg("float_activations"), threads);
    bind_engine(m);
}
