// The class Engine of the Python module: a whole model, see septet.h.
#include "module_layer.h"

#include <nanobind/stl/vector.h>

#include <vector>

namespace septet {
namespace {

class Engine {
public:
    // sizes: layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary, context, as in septet_model_shape.
    Engine(const std::array<int64_t, 8>& sizes, float epsilon, bool float_activations, const std::string& cache) {
        shape_ = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7], epsilon,
                  float_activations ? SEPTET_ACTIVATIONS_FLOAT : SEPTET_ACTIVATIONS_INT8, cache_code(cache)};
        std::string text = "epsilon " + std::to_string(epsilon) + ", sizes";
        for (const int64_t size : sizes) text += " " + std::to_string(size);
        run([&] { return septet_engine_create(&shape_, &engine_); }, text);
    }
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    ~Engine() { septet_engine_free(engine_); }

    void set_weights(int slot, int64_t layer, const std::vector<const Layer*>& layers) {
        std::vector<const septet_layer*> stored;
        std::string text = "layers of";
        for (const Layer* one : layers) {
            stored.push_back(&one->stored());
            text += " " + std::to_string(one->stored().in_features) + " x " + std::to_string(one->stored().out_features);
        }
        run([&] { return septet_engine_set_weights(engine_, slot, layer, stored.data(), static_cast<int>(stored.size())); }, text + " in " + place(slot, layer));
    }

    void set_vector(int slot, int64_t layer, const AnyArray& values) {
        const float* data = view<float>(values, "values", {kAny});
        run([&] { return septet_engine_set_vector(engine_, slot, layer, data, size_of(values, 0)); }, describe(values) + " in " + place(slot, layer));
    }

    void set_window(int64_t layer, int64_t window) {
        run([&] { return septet_engine_set_window(engine_, layer, window); }, std::to_string(window));
    }

    nb::object append(const AnyArray& tokens, int64_t wanted, int threads, int64_t text) {
        const int32_t* data = view<int32_t>(tokens, "tokens", {kAny});
        const int64_t count = size_of(tokens, 0);
        if (wanted < 0 || wanted > count) raise("ShapeError", "wanted logits must be at most as many as tokens", std::to_string(wanted), "ask for fewer");
        Result<float> out({static_cast<size_t>(wanted), static_cast<size_t>(shape_.vocabulary)});
        const std::string got = std::to_string(length(text)) + " and " + std::to_string(count) + " tokens, of a vocabulary of " + std::to_string(shape_.vocabulary) +
                                ", in a context of " + std::to_string(shape_.context);
        run([&] { return septet_engine_run(engine_, text, data, count, wanted, out.data, threads); }, got);
        return out.array;
    }

    nb::object step(const AnyArray& texts, const AnyArray& tokens, int threads) {
        const int64_t* numbers = view<int64_t>(texts, "texts", {kAny});
        const int64_t count = size_of(texts, 0);
        const int32_t* data = view<int32_t>(tokens, "tokens", {count});
        Result<float> out({static_cast<size_t>(count), static_cast<size_t>(shape_.vocabulary)});
        const std::string got = std::to_string(count) + " texts, a vocabulary of " + std::to_string(shape_.vocabulary) + ", a context of " +
                                std::to_string(shape_.context);
        run([&] { return septet_engine_step(engine_, numbers, data, count, out.data, threads); }, got);
        return out.array;
    }

    void truncate(int64_t length, int64_t text) {
        run([&] { return septet_engine_truncate(engine_, text, length); }, std::to_string(length) + " of " + std::to_string(this->length(text)) + " tokens");
    }

    int64_t length(int64_t text) const {
        int64_t length = 0;
        const nb::gil_scoped_release released;  // another thread may be running the engine
        septet_engine_length(engine_, text, &length);
        return length;
    }

    nb::object memory() const {
        int64_t weights = 0, cache = 0;
        {
            const nb::gil_scoped_release released;
            septet_engine_memory(engine_, &weights, &cache);
        }
        return nb::make_tuple(weights, cache);
    }

private:
    // An unknown name becomes a code that septet_engine_create refuses.
    static int cache_code(const std::string& name) {
        return name == "float32" ? SEPTET_FLOAT32 : name == "float16" ? SEPTET_FLOAT16 : name == "int8" ? SEPTET_INT8 : -1;
    }
    static std::string place(int slot, int64_t layer) { return "slot " + std::to_string(slot) + " of layer " + std::to_string(layer); }

    septet_model_shape shape_{};
    septet_engine* engine_ = nullptr;
};

}  // namespace

void bind_engine(nb::module_& m) {
    nb::class_<Engine>(m, "Engine")
        .def(nb::init<const std::array<int64_t, 8>&, float, bool, const std::string&>(), nb::arg("sizes"), nb::arg("epsilon"), nb::arg("float_activations"),
             nb::arg("cache"))
        .def("set_weights", &Engine::set_weights, nb::arg("slot"), nb::arg("layer"), nb::arg("layers"))
        .def("set_vector", &Engine::set_vector, nb::arg("slot"), nb::arg("layer"), nb::arg("values").noconvert())
        .def("set_window", &Engine::set_window, nb::arg("layer"), nb::arg("window"))
        .def("append", &Engine::append, nb::arg("tokens").noconvert(), nb::arg("wanted"), nb::arg("threads") = 0, nb::arg("text") = 0)
        .def("step", &Engine::step, nb::arg("texts").noconvert(), nb::arg("tokens").noconvert(), nb::arg("threads") = 0)
        .def("truncate", &Engine::truncate, nb::arg("length"), nb::arg("text") = 0)
        .def("length", &Engine::length, nb::arg("text") = 0)
        .def("memory", &Engine::memory);
}

}  // namespace septet
