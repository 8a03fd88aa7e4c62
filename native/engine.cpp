// The C functions about whole models: checks, then engine_weights.cpp and engine_forward.cpp.
#include "engine.h"

#include <cmath>

using namespace septet;

namespace {

constexpr int64_t kMaxLayers = 1 << 12, kMaxContext = 1 << 24, kMaxVocabulary = 1 << 28, kMaxTexts = 1 << 12;

bool within(int64_t value, int64_t most) { return value >= 1 && value <= most; }

int check_shape(const septet_model_shape& s) {
    const bool sizes = within(s.layers, kMaxLayers) && within(s.hidden, kMaxInputs) && within(s.intermediate, kMaxInputs) && within(s.heads, kMaxInputs) &&
                       within(s.kv_heads, kMaxInputs) && within(s.head_dim, kMaxHeadDim) && within(s.vocabulary, kMaxVocabulary) && within(s.context, kMaxContext);
    if (!sizes || s.head_dim % 2 != 0 || s.heads % s.kv_heads != 0 || s.heads * s.head_dim > kMaxInputs) return SEPTET_ERROR_SIZE;
    if (!(s.epsilon > 0) || !std::isfinite(s.epsilon)) return SEPTET_ERROR_SIZE;
    if (s.activations != SEPTET_ACTIVATIONS_INT8 && s.activations != SEPTET_ACTIVATIONS_FLOAT) return SEPTET_ERROR_CODE;
    return s.cache == SEPTET_FLOAT32 || s.cache == SEPTET_FLOAT16 || s.cache == SEPTET_INT8 ? SEPTET_OK : SEPTET_ERROR_CODE;
}

// Runs body() alone in an engine; a failed allocation becomes an error number.
template <class Body>
int with_model(septet_engine* engine, const Body& body) {
    if (engine == nullptr) return SEPTET_ERROR_NULL;
    try {
        const std::lock_guard<std::mutex> lock(engine->model.mutex);
        return body(engine->model);
    } catch (const std::bad_alloc&) {
        return SEPTET_ERROR_MEMORY;
    }
}

struct Features { int64_t inputs, outputs; };

// Sizes of the layers of a slot; empty when there is no such slot.
std::vector<Features> slot_features(const septet_model_shape& s, int slot) {
    const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
    switch (slot) {
        case SEPTET_SLOT_EMBEDDING:
        case SEPTET_SLOT_HEAD: return {{s.hidden, s.vocabulary}};
        case SEPTET_SLOT_QKV: return {{s.hidden, queries}, {s.hidden, keys}, {s.hidden, keys}};
        case SEPTET_SLOT_OUT: return {{queries, s.hidden}};
        case SEPTET_SLOT_GATE_UP: return {{s.hidden, s.intermediate}, {s.hidden, s.intermediate}};
        case SEPTET_SLOT_DOWN: return {{s.intermediate, s.hidden}};
        default: return {};
    }
}

Slot* find_slot(Model& model, int slot, int64_t layer) {
    if (slot == SEPTET_SLOT_EMBEDDING) return &model.embedding;
    if (slot == SEPTET_SLOT_HEAD) return &model.head;
    if (layer < 0 || layer >= model.shape.layers) return nullptr;
    Block& block = model.blocks[static_cast<size_t>(layer)];
    return slot == SEPTET_SLOT_QKV ? &block.qkv : slot == SEPTET_SLOT_OUT ? &block.out : slot == SEPTET_SLOT_GATE_UP ? &block.gate_up : &block.down;
}

struct Vector { std::vector<float>* values; int64_t count; };

// Where a vector is kept and how long it must be; values nullptr: there is no such vector.
Vector find_vector(Model& model, int slot, int64_t layer) {
    const septet_model_shape& s = model.shape;
    if (slot == SEPTET_SLOT_FREQUENCIES) return {&model.frequencies, s.head_dim / 2};
    if (slot == SEPTET_SLOT_FINAL_NORM) return {&model.final_norm, s.hidden};
    if (layer < 0 || layer >= s.layers) return {nullptr, 0};
    Block& block = model.blocks[static_cast<size_t>(layer)];
    const int64_t queries = s.heads * s.head_dim, keys = s.kv_heads * s.head_dim;
    switch (slot) {
        case SEPTET_SLOT_ATTENTION_NORM: return {&block.attention_norm, s.hidden};
        case SEPTET_SLOT_MLP_NORM: return {&block.mlp_norm, s.hidden};
        case SEPTET_SLOT_Q_NORM: return {&block.q_norm, s.head_dim};
        case SEPTET_SLOT_K_NORM: return {&block.k_norm, s.head_dim};
        case SEPTET_SLOT_Q_BIAS: return {&block.biases[kQ], queries};
        case SEPTET_SLOT_K_BIAS: return {&block.biases[kK], keys};
        case SEPTET_SLOT_V_BIAS: return {&block.biases[kV], keys};
        case SEPTET_SLOT_OUT_BIAS: return {&block.biases[kOut], s.hidden};
        case SEPTET_SLOT_GATE_BIAS: return {&block.biases[kGate], s.intermediate};
        case SEPTET_SLOT_UP_BIAS: return {&block.biases[kUp], s.intermediate};
        case SEPTET_SLOT_DOWN_BIAS: return {&block.biases[kDown], s.hidden};
        default: return {nullptr, 0};
    }
}

// Runs body(text) with a text of the engine; one that nobody used before is empty.
template <class Body>
int with_text(septet_engine* engine, int64_t text, const Body& body) {
    return with_model(engine, [&](Model& model) -> int {
        if (text < 0 || text >= kMaxTexts) return SEPTET_ERROR_SIZE;
        while (static_cast<int64_t>(model.texts.size()) <= text) model.texts.emplace_back(model.shape);
        return body(model, model.texts[static_cast<size_t>(text)]);
    });
}

int check_tokens(const Model& model, const int32_t* tokens, int64_t count) {
    if (!model.is_complete()) return SEPTET_ERROR_INCOMPLETE;
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= model.shape.vocabulary) return SEPTET_ERROR_TOKEN;
    return SEPTET_OK;
}

}  // namespace

extern "C" {

int septet_engine_create(const septet_model_shape* shape, septet_engine** engine) {
    if (shape == nullptr || engine == nullptr) return SEPTET_ERROR_NULL;
    if (const int error = check_shape(*shape)) return error;
    try {
        std::unique_ptr<septet_engine> made(new septet_engine);
        made->model.shape = *shape;
        made->model.blocks.resize(static_cast<size_t>(shape->layers));
        *engine = made.release();
    } catch (const std::bad_alloc&) {
        return SEPTET_ERROR_MEMORY;
    }
    return SEPTET_OK;
}

void septet_engine_free(septet_engine* engine) { delete engine; }

int septet_engine_set_weights(septet_engine* engine, int slot, int64_t layer, const septet_layer* const* layers, int count) {
    return with_model(engine, [&](Model& model) -> int {
        if (layers == nullptr) return SEPTET_ERROR_NULL;
        const std::vector<Features> features = slot_features(model.shape, slot);
        Slot* target = find_slot(model, slot, layer);
        if (features.empty() || target == nullptr || count != static_cast<int>(features.size())) return SEPTET_ERROR_SIZE;
        for (int i = 0; i < count; i++) {
            if (const int error = check_layer(layers[i], true)) return error;
            if (layers[i]->in_features != features[static_cast<size_t>(i)].inputs || layers[i]->out_features != features[static_cast<size_t>(i)].outputs)
                return SEPTET_ERROR_SIZE;
            if (slot == SEPTET_SLOT_EMBEDDING && is_tiled(layers[i]->code)) return SEPTET_ERROR_CODE;
        }
        target->set(model.arena, layers, count);
        model.work.tokens = 0;  // sizes may have changed
        return SEPTET_OK;
    });
}

int septet_engine_set_vector(septet_engine* engine, int slot, int64_t layer, const float* values, int64_t count) {
    return with_model(engine, [&](Model& model) -> int {
        if (values == nullptr) return SEPTET_ERROR_NULL;
        const Vector vector = find_vector(model, slot, layer);
        if (vector.values == nullptr || vector.count != count) return SEPTET_ERROR_SIZE;
        vector.values->assign(values, values + count);
        return SEPTET_OK;
    });
}

int septet_engine_set_window(septet_engine* engine, int64_t layer, int64_t window) {
    return with_model(engine, [&](Model& model) -> int {
        if (layer < 0 || layer >= model.shape.layers || window < 0) return SEPTET_ERROR_SIZE;
        model.blocks[static_cast<size_t>(layer)].window = window;
        return SEPTET_OK;
    });
}

int septet_engine_run(septet_engine* engine, int64_t text, const int32_t* tokens, int64_t count, int64_t wanted, float* logits, int threads) {
    return with_text(engine, text, [&](Model& model, Text& found) -> int {
        if (count < 0 || wanted < 0 || wanted > count) return SEPTET_ERROR_SIZE;
        if ((count > 0 && tokens == nullptr) || (wanted > 0 && logits == nullptr)) return SEPTET_ERROR_NULL;
        if (const int error = check_tokens(model, tokens, count)) return error;
        if (count > model.shape.context - found.length) return SEPTET_ERROR_CONTEXT;
        return with_kernels(threads, [&](const KernelTable& kernels, int workers) -> int {
            append_tokens(kernels, model, found, tokens, count, wanted, logits, workers);
            return SEPTET_OK;
        });
    });
}

int septet_engine_step(septet_engine* engine, const int64_t* texts, const int32_t* tokens, int64_t count, float* logits, int threads) {
    return with_model(engine, [&](Model& model) -> int {
        if (count < 0 || count > kMaxTexts) return SEPTET_ERROR_SIZE;
        if (count > 0 && (texts == nullptr || tokens == nullptr || logits == nullptr)) return SEPTET_ERROR_NULL;
        if (const int error = check_tokens(model, tokens, count)) return error;
        std::vector<Text*> chosen;
        std::vector<bool> taken(model.texts.size());
        for (int64_t i = 0; i < count; i++) {
            if (texts[i] < 0 || texts[i] >= static_cast<int64_t>(taken.size()) || taken[static_cast<size_t>(texts[i])]) return SEPTET_ERROR_SIZE;
            taken[static_cast<size_t>(texts[i])] = true;
            chosen.push_back(&model.texts[static_cast<size_t>(texts[i])]);
            if (chosen.back()->length >= model.shape.context) return SEPTET_ERROR_CONTEXT;
        }
        return with_kernels(threads, [&](const KernelTable& kernels, int workers) -> int {
            append_to_each(kernels, model, chosen.data(), tokens, count, logits, workers);
            return SEPTET_OK;
        });
    });
}

int septet_engine_truncate(septet_engine* engine, int64_t text, int64_t length) {
    return with_text(engine, text, [&](Model&, Text& found) -> int {
        if (length < 0 || length > found.length) return SEPTET_ERROR_SIZE;
        found.length = length;
        found.cache.shrink(length);
        return SEPTET_OK;
    });
}

int septet_engine_length(septet_engine* engine, int64_t text, int64_t* length) {
    return with_text(engine, text, [&](Model&, Text& found) -> int {
        if (length == nullptr) return SEPTET_ERROR_NULL;
        *length = found.length;
        return SEPTET_OK;
    });
}

int septet_engine_memory(septet_engine* engine, int64_t* weights, int64_t* cache) {
    return with_model(engine, [&](Model& model) -> int {
        if (weights == nullptr || cache == nullptr) return SEPTET_ERROR_NULL;
        *weights = model.arena.used();
        *cache = 0;
        for (const Text& text : model.texts) *cache += text.cache.bytes();
        return SEPTET_OK;
    });
}

}  // extern "C"
