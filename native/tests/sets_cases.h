// What compare_sets.cpp computes with every instruction set: all functions of the C interface at odd sizes, from the same random numbers each time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "septet.h"

struct Exact { std::string name; std::vector<char> bytes; };
struct Near { std::string name; std::vector<float> values; double bound; };
struct Results {
    std::vector<Exact> exact;
    std::vector<Near> near;

    template <class T>
    void add(const std::string& name, const std::vector<T>& values) {
        const char* bytes = reinterpret_cast<const char*>(values.data());
        exact.push_back({name, {bytes, bytes + values.size() * sizeof(T)}});
    }
};

inline void require(int error) {
    if (error == SEPTET_OK) return;
    std::fprintf(stderr, "an error that must not be: %s\n", septet_error_message(error));
    std::exit(2);
}

// The same numbers on every machine.
class Random {
public:
    uint64_t next() {  // splitmix64
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return z ^ z >> 31;
    }
    template <class T>
    std::vector<T> bytes(int64_t count) {
        std::vector<T> result(static_cast<size_t>(count));
        for (T& value : result) value = static_cast<T>(next());
        return result;
    }
    // -127 .. 127, or any int8 with many of the lowest.
    std::vector<int8_t> activations(int64_t count, bool lowest) {
        std::vector<int8_t> result = bytes<int8_t>(count);
        for (int8_t& x : result) x = lowest && next() % 20 == 0 ? int8_t{-128} : !lowest && x == -128 ? int8_t{127} : x;
        return result;
    }
    std::vector<float> floats(int64_t count, float from, float to) {
        std::vector<float> result(static_cast<size_t>(count));
        for (float& x : result) x = from + (to - from) * static_cast<float>(next() % (1 << 20)) / (1 << 20);
        return result;
    }

private:
    uint64_t state_ = 1;
};

inline double largest_row_sum(const std::vector<float>& x, int64_t features) {
    double largest = 0;
    for (size_t i = 0; i < x.size(); i += static_cast<size_t>(features)) {
        double sum = 0;
        for (int64_t k = 0; k < features; k++) sum += std::fabs(static_cast<double>(x[i + static_cast<size_t>(k)]));
        largest = std::max(largest, sum);
    }
    return largest;
}

// Two sums of K products, each within 2 K 2^-24 of the sum of absolute products.
inline double float_bound(const std::vector<float>& x, int64_t features, double largest_weight) {
    return 4 * static_cast<double>(features) * 0x1p-24 * largest_weight * largest_row_sum(x, features);
}

// All windows at places that do not overlap, from several starts, so that each place of a tile comes round its end once.
inline void decode_every_window(Results& results) {
    constexpr int wide = 3, per_tile = 128 / wide, tiles = 65536 / per_tile + 1;
    for (int bits = 6; bits <= 8; bits++)
        for (int start : {0, 1, 2, 126, 127}) {
            std::vector<uint8_t> symbols(tiles * 128), packed(static_cast<size_t>(tiles) * 16 * bits);
            for (int t = 0; t < tiles; t++)
                for (int i = 0; i < per_tile; i++)
                    for (int part = 0, window = (t * per_tile + i) % 65536; part < wide; part++, window >>= bits)
                        symbols[static_cast<size_t>(t * 128 + (start + wide * i + part) % 128)] = static_cast<uint8_t>(window & ((1 << bits) - 1));
            require(septet_pack(symbols.data(), tiles, bits, packed.data()));
            const septet_tiles matrix = {packed.data(), 1, tiles, bits};
            std::vector<int8_t> levels(tiles * 256);
            require(septet_trellis_levels(&matrix, levels.data(), 1));
            results.add("levels of all windows", levels);
            std::vector<uint8_t> fields(tiles * 256);
            if (bits == 7) require(septet_split_fields(&matrix, fields.data(), 1));
            results.add("fields", fields);
        }
}

struct Shape { int64_t rows, columns; };
constexpr Shape kShapes[] = {{1, 1}, {1, 2}, {2, 3}, {1, 33}, {1, 70}};  // the last is more than a buffer of decoded tiles holds

inline void trellis_products(Results& results, Random& random) {
    for (int bits = 6; bits <= 8; bits++)
        for (int64_t tokens = 1; tokens <= 17; tokens++)
            for (const Shape& shape : kShapes) {
                if (tokens > 5 && shape.columns < 33) continue;
                const int64_t inputs = 4 * shape.columns, outputs = 64 * shape.rows;
                const std::vector<uint8_t> packed = random.bytes<uint8_t>(shape.rows * shape.columns * 16 * bits);
                const septet_tiles matrix = {packed.data(), shape.rows, shape.columns, bits};
                const std::vector<int8_t> x = random.activations(tokens * inputs, tokens % 3 == 0);
                std::vector<int32_t> sums(static_cast<size_t>(tokens * outputs));
                require(septet_trellis_accumulate(&matrix, x.data(), tokens, sums.data(), 1));
                results.add("trellis sums", sums);
                for (int64_t segment : {1, 10, 64, 4096}) {
                    if (tokens > 5 && segment != 64) continue;
                    const std::vector<float> scales = random.floats(tokens * ((inputs + segment - 1) / segment), 0, 1);
                    const septet_activations activations = {x.data(), scales.data(), tokens, segment};
                    std::vector<float> y(static_cast<size_t>(tokens * outputs));
                    require(septet_trellis_product(&matrix, &activations, y.data(), 1));
                    results.add("trellis product", y);
                }
            }
}

// All inputs of one sign at the largest levels, where sums and biases are as long as they get.
inline void longest_sums(Results& results) {
    constexpr int64_t columns = 7168, tokens = 3;
    const std::vector<uint8_t> packed(columns * 128, 0x5A);
    const septet_tiles matrix = {packed.data(), 1, columns, 8};
    for (int value : {127, -127, -128}) {
        const std::vector<int8_t> x(tokens * 4 * columns, static_cast<int8_t>(value));
        for (int64_t count : {int64_t{1}, tokens}) {  // decoded on the way, and into a buffer
            std::vector<int32_t> sums(static_cast<size_t>(count) * 64);
            require(septet_trellis_accumulate(&matrix, x.data(), count, sums.data(), 1));
            results.add("long sums", sums);
        }
    }
}

inline void split_products(Results& results, Random& random) {
    for (int64_t tokens : {1, 2, 3, 5, 9})
        for (const Shape& shape : kShapes)
            for (int64_t group : {int64_t{4}, int64_t{64}, 4 * shape.columns})
                for (bool with_offsets : {false, true}) {
                    const int64_t inputs = 4 * shape.columns, outputs = 64 * shape.rows - 7, groups = (inputs + group - 1) / group;
                    const std::vector<uint8_t> packed = random.bytes<uint8_t>(shape.rows * shape.columns * 112);
                    const septet_tiles matrix = {packed.data(), shape.rows, shape.columns, 7};
                    const std::vector<int8_t> x = random.activations(tokens * inputs, true);
                    const std::vector<float> scale = random.floats(128 * groups * shape.rows, 0, 1), offset = random.floats(128 * groups * shape.rows, -1, 1);
                    const std::vector<float> x_scales = random.floats(tokens * groups, 0, 1), x_floats = random.floats(tokens * inputs, -1, 1);
                    const septet_split_scales scales = {scale.data(), with_offsets ? offset.data() : nullptr, group};
                    const septet_activations activations = {x.data(), x_scales.data(), tokens, group};
                    std::vector<float> y(static_cast<size_t>(tokens * outputs));
                    require(septet_split_product(&matrix, &scales, &activations, outputs, y.data(), 1));
                    results.add("split product", y);
                    require(septet_split_product_float(&matrix, &scales, x_floats.data(), tokens, outputs, y.data(), 1));
                    results.near.push_back({"split product of floats", y, float_bound(x_floats, inputs, 16)});
                }
}

inline void row_products(Results& results, Random& random) {
    for (int64_t tokens : {1, 2, 3, 4, 5, 17})
        for (int64_t rows : {1, 5, 66})
            for (int64_t features : {1, 7, 8, 15, 16, 17, 63, 64, 65, 191, 256}) {
                const std::vector<int8_t> weight = random.activations(rows * features, true), x = random.activations(tokens * features, true);
                const std::vector<float> scale = random.floats(rows, 0, 1), x_scales = random.floats(tokens, 0, 1), floats = random.floats(tokens * features, -1, 1);
                const septet_rows matrix = {weight.data(), scale.data(), rows, features};
                const septet_activations activations = {x.data(), x_scales.data(), tokens, features};
                std::vector<float> y(static_cast<size_t>(tokens * rows));
                require(septet_int8_product(&matrix, &activations, y.data(), 1));
                results.add("int8 product", y);
                require(septet_int8_product_float(&matrix, floats.data(), tokens, y.data(), 1));
                results.near.push_back({"int8 product of floats", y, float_bound(floats, features, 128)});
            }
}

inline void float_products(Results& results, Random& random) {
    for (int64_t tokens : {1, 2, 3, 4, 5, 7})
        for (const Shape& shape : kShapes) {
            const std::vector<uint8_t> packed = random.bytes<uint8_t>(shape.rows * shape.columns * 112);
            const septet_tiles matrix = {packed.data(), shape.rows, shape.columns, 7};
            const std::vector<float> x = random.floats(tokens * 4 * shape.columns, -1, 1);
            std::vector<float> y(static_cast<size_t>(tokens * 64 * shape.rows));
            require(septet_trellis_product_float(&matrix, x.data(), tokens, y.data(), 1));
            results.near.push_back({"trellis product of floats", y, float_bound(x, 4 * shape.columns, 127)});
        }
}

inline void prepare_activations(Results& results, Random& random) {
    for (int64_t block = 1; block <= 1024; block *= 2) {
        std::vector<float> x = random.floats(15 * block, -1, 1), y(x.size());
        for (size_t i = 0; i < x.size(); i += 7) x[i] *= 1e-30f;
        x[0] = -0.0f;
        require(septet_hadamard(x.data(), 3, 5 * block, block, y.data()));
        results.add("rotation", y);
    }
    for (int64_t features : {1, 15, 64, 300, 576})
        for (int64_t segment : {1, 3, 16, 37, 256, 1000}) {
            constexpr int64_t tokens = 9;
            std::vector<float> x = random.floats(tokens * features, -1, 1);
            const float factors[tokens] = {1, 0, 0x1p-101f, 1e-44f, 1e38f, std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(), -1, 1};
            for (int64_t m = 0; m < tokens; m++)
                for (int64_t k = 0; k < features; k++) {
                    float& at = x[static_cast<size_t>(m * features + k)];
                    if (m == 8) at = k == 0 ? 254.0f : std::floor(at * 127);  // halves of a step: ties
                    else if (std::isfinite(factors[m]) || k == features - 1) at *= factors[m];
                }
            std::vector<int8_t> values(x.size());
            std::vector<float> scales(static_cast<size_t>(tokens * ((features + segment - 1) / segment)));
            require(septet_quantize_activations(x.data(), tokens, features, segment, values.data(), scales.data()));
            results.add("rounded activations", values);
            for (float& scale : scales) scale = std::isnan(scale) ? -1.0f : scale;  // every NaN equals every other
            results.add("activation scales", scales);
        }
}

inline void encode(Results& results, Random& random) {
    for (int bits = 6; bits <= 8; bits++) {
        const int64_t tiles = bits == 7 ? 4 : 1;  // as many as the search takes at once, and one
        std::vector<int16_t> fixed(static_cast<size_t>(tiles * 256));
        for (int16_t& value : fixed) value = static_cast<int16_t>((static_cast<int>(random.next() % 681) + static_cast<int>(random.next() % 681)) - 680);
        std::vector<uint8_t> symbols(static_cast<size_t>(tiles * 128));
        require(septet_trellis_encode(fixed.data(), tiles, bits, symbols.data(), 1));
        results.add("encoded symbols", symbols);
    }
}

// A layer with weights of its own: trellis, split, or dense rows (int8 and float16 of small numbers).
struct OwnLayer {
    std::vector<uint8_t> weight;
    std::vector<float> scale, offset, input_scale;
    septet_layer layer;

    OwnLayer(Random& random, int code, int bits, int64_t inputs, int64_t outputs) {
        const bool tiled = code == SEPTET_TRELLIS || code == SEPTET_SPLIT;
        const int64_t tiles = (outputs + 63) / 64 * ((inputs + 3) / 4);
        weight = random.bytes<uint8_t>(tiled ? tiles * 16 * bits : inputs * outputs * (code == SEPTET_INT8 ? 1 : 2));
        if (code == SEPTET_FLOAT16)  // 2^-8 .. 2^-1, either sign
            for (size_t i = 1; i < weight.size(); i += 2) weight[i] = static_cast<uint8_t>((weight[i] & 0x80) | (0x1C + weight[i] % 28));
        scale = random.floats(code == SEPTET_SPLIT ? 128 * ((outputs + 63) / 64) : outputs, 0.0005f, 0.002f);
        input_scale = random.floats(inputs, 0.5f, 1.5f);
        const bool rotated = code == SEPTET_TRELLIS || code == SEPTET_INT8;
        layer = {code, bits, inputs, outputs, weight.data(), scale.data(), nullptr, rotated ? input_scale.data() : nullptr,
                 rotated ? 32 : 1, code == SEPTET_TRELLIS ? 32 : 1, 0, code == SEPTET_TRELLIS ? 32 : 0, nullptr};
    }
};

// Layers in the order that the set in use has for them.
inline void arranged_layers(Results& results, Random& random) {
    for (int bits = 6; bits <= 8; bits++)
        for (int64_t tokens : {1, 2, 4, 5, 9, 17})
            for (int64_t inputs : {96, 1184}) {
                OwnLayer own(random, SEPTET_TRELLIS, bits, inputs, 192);
                std::vector<uint8_t> arranged(own.weight.size());
                const std::vector<float> x = random.floats(tokens * inputs, -1, 1);
                std::vector<float> wanted(static_cast<size_t>(tokens * 192)), found(wanted.size());
                require(septet_linear(&own.layer, x.data(), tokens, SEPTET_ACTIVATIONS_INT8, wanted.data(), 1));
                require(septet_arrange(&own.layer, arranged.data()));
                require(septet_linear(&own.layer, x.data(), tokens, SEPTET_ACTIVATIONS_INT8, found.data(), 1));
                if (found != wanted) require(SEPTET_ERROR_RANGE);
                results.add("arranged layer", found);
            }
}

// A small model: logits of a text in one call, then token by token.
inline void run_engine(Results& results, Random& random, int cache, int head_code, int64_t tokens) {
    constexpr int64_t hidden = 64, inner = 96, heads = 4, kv_heads = 2, dim = 16, vocabulary = 70, layers = 2;
    const septet_model_shape shape = {layers, hidden, inner, heads, kv_heads, dim, vocabulary, 400, 1e-5f, SEPTET_ACTIVATIONS_INT8, cache};
    septet_engine* engine = nullptr;
    require(septet_engine_create(&shape, &engine));
    std::vector<std::unique_ptr<OwnLayer>> owned;
    const auto set = [&](int slot, int64_t layer, std::vector<septet_layer> parts) {
        std::vector<const septet_layer*> pointers;
        for (const septet_layer& part : parts) pointers.push_back(&part);
        require(septet_engine_set_weights(engine, slot, layer, pointers.data(), static_cast<int>(pointers.size())));
    };
    const auto make = [&](int code, int bits, int64_t inputs, int64_t outputs) {
        owned.push_back(std::make_unique<OwnLayer>(random, code, bits, inputs, outputs));
        return owned.back()->layer;
    };
    const auto vector = [&](int slot, int64_t layer, int64_t count, float low, float high) {
        require(septet_engine_set_vector(engine, slot, layer, random.floats(count, low, high).data(), count));
    };
    set(SEPTET_SLOT_EMBEDDING, 0, {make(SEPTET_FLOAT16, 7, hidden, vocabulary)});
    set(SEPTET_SLOT_HEAD, 0, {make(head_code, 7, hidden, vocabulary)});
    vector(SEPTET_SLOT_FREQUENCIES, 0, dim / 2, 0.001f, 1);
    vector(SEPTET_SLOT_FINAL_NORM, 0, hidden, 0.5f, 1.5f);
    for (int64_t l = 0; l < layers; l++) {
        set(SEPTET_SLOT_QKV, l, {make(SEPTET_TRELLIS, 7, hidden, heads * dim), make(SEPTET_TRELLIS, 7, hidden, kv_heads * dim), make(SEPTET_TRELLIS, 7, hidden, kv_heads * dim)});
        set(SEPTET_SLOT_OUT, l, {make(SEPTET_TRELLIS, 8, heads * dim, hidden)});
        set(SEPTET_SLOT_GATE_UP, l, {make(SEPTET_TRELLIS, 6, hidden, inner), make(SEPTET_TRELLIS, 6, hidden, inner)});
        set(SEPTET_SLOT_DOWN, l, {make(SEPTET_SPLIT, 7, inner, hidden)});
        vector(SEPTET_SLOT_ATTENTION_NORM, l, hidden, 0.5f, 1.5f);
        vector(SEPTET_SLOT_MLP_NORM, l, hidden, 0.5f, 1.5f);
    }
    std::vector<int32_t> text(static_cast<size_t>(tokens));
    for (int32_t& token : text) token = static_cast<int32_t>(random.next() % vocabulary);
    std::vector<float> logits(3 * vocabulary);
    require(septet_engine_run(engine, 0, text.data(), tokens, 3, logits.data(), 1));
    for (float logit : logits)
        if (!std::isfinite(logit)) require(SEPTET_ERROR_RANGE);
    results.add("logits", logits);
    for (int64_t i = 0; i < 3; i++) {
        require(septet_engine_run(engine, 0, text.data() + i, 1, 1, logits.data(), 1));
        results.add("logits of one token", logits);
    }
    septet_engine_free(engine);
}

inline Results run_cases() {
    Results results;
    Random random;
    decode_every_window(results);
    trellis_products(results, random);
    longest_sums(results);
    split_products(results, random);
    row_products(results, random);
    float_products(results, random);
    prepare_activations(results, random);
    encode(results, random);
    arranged_layers(results, random);
    run_engine(results, random, SEPTET_FLOAT16, SEPTET_INT8, 260);  // a page of the cache and a bit
    run_engine(results, random, SEPTET_FLOAT32, SEPTET_FLOAT16, 20);
    return results;
}
