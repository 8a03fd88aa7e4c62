// The forward pass: some tokens of a text through all layers, behind what the cache holds.
//
// Steps between products go token by token, attention by token and key-value head; each of these parts is computed whole by one thread, so that
// neither their number nor the way a text is cut into calls changes a bit.
#include <algorithm>
#include <cmath>

#include "engine.h"

namespace septet {
namespace {

constexpr int64_t kTokensAtOnce = 128;  // bounds the workspace; products decode weights once for as many

// Where a token goes.
struct Place { Cache* cache; int64_t position; };

class Pass {
public:
    Pass(const KernelTable& kernels, Model& model, const int32_t* tokens, const std::vector<Place>& places, int threads)
        : kernels_(kernels), model_(model), shape_(model.shape), work_(model.work), tokens_(tokens), places_(places),
          count_(static_cast<int64_t>(places.size())), threads_(threads) {}

    // Leaves the residual stream in work_.x.
    void through_layers() {
        look_up();
        set_angles();
        for (int64_t layer = 0; layer < shape_.layers; layer++) {
            attention(layer);
            feed_forward(model_.blocks[static_cast<size_t>(layer)]);
        }
    }

    // logits [wanted][vocabulary] after the last tokens.
    void write_logits(int64_t wanted, float* logits) {
        if (wanted == 0) return;
        normalize(work_.x.get() + (count_ - wanted) * shape_.hidden, wanted, model_.final_norm);
        const Linear& head = model_.output().linears[0];
        const int64_t width = head.stored.out_features;
        Array<float> padded = width == shape_.vocabulary ? nullptr : make_array<float>(wanted * width);
        float* y = padded ? padded.get() : logits;
        multiply(head, work_.normed.get(), wanted, y);
        for (int64_t m = 0; m < wanted; m++) {
            head.finish(kernels_, wanted, 0, width, y + m * width);
            if (padded) std::copy_n(y + m * width, shape_.vocabulary, logits + m * shape_.vocabulary);
        }
    }

private:
    // body(token) for every token of the pass; `work` is what a token costs, in weights of a product.
    template <class Body> void for_tokens(int64_t tokens, int64_t work, const Body& body) {
        parallel_for(worthwhile_threads(threads_, work, tokens), tokens, [&](int64_t first, int64_t last) {
            for (int64_t m = first; m < last; m++) body(m);
        });
    }

    void look_up() {
        const Linear& rows = model_.embedding.linears[0];
        const septet_layer& stored = rows.stored;
        const int64_t hidden = shape_.hidden;
        for_tokens(count_, hidden * 16, [&](int64_t m) {
            float* x = work_.x.get() + m * hidden;
            const int64_t row = tokens_[m];
            if (is_dense(stored.code)) {
                const int type = stored.code == SEPTET_FLOAT32 ? kFloat32 : stored.code == SEPTET_FLOAT16 ? kFloat16 : kBfloat16;
                return kernels_.model->widen(type, static_cast<const char*>(stored.weight) + row * hidden * float_bytes(type), hidden, x);
            }
            const int8_t* q = static_cast<const int8_t*>(stored.weight) + row * hidden;
            for (int64_t k = 0; k < hidden; k++) x[k] = stored.scale[row] * static_cast<float>(q[k]);
            if (stored.input_block > 1) kernels_.hadamard(x, hidden, stored.input_block);
            if (stored.input_scale != nullptr) kernels_.multiply(x, stored.input_scale, hidden, x);
        });
    }

    void set_angles() {
        const int64_t half = shape_.head_dim / 2;
        for (int64_t m = 0; m < count_; m++)
            for (int64_t i = 0; i < half; i++) {
                const float angle = static_cast<float>(place_of(m).position) * model_.frequencies[static_cast<size_t>(i)];
                work_.cosines[m * half + i] = std::cos(angle);
                work_.sines[m * half + i] = std::sin(angle);
            }
    }

    void normalize(const float* x, int64_t tokens, const std::vector<float>& weight) {
        for_tokens(tokens, shape_.hidden * 8, [&](int64_t m) {
            kernels_.model->rms_norm(x + m * shape_.hidden, weight.data(), shape_.hidden, shape_.epsilon, work_.normed.get() + m * shape_.hidden);
        });
    }

    void multiply(const Linear& linear, const float* x, int64_t tokens, float* y) {
        const Layer layer = linear.layer();
        const PreparedInputs inputs{work_.rotated.get(), work_.values.get(), work_.scales.get()};
        const bool as_float = shape_.activations == SEPTET_ACTIVATIONS_FLOAT;
        prepare_inputs(kernels_, layer, x, tokens, as_float, inputs, threads_);
        multiply_inputs(kernels_, layer, inputs, tokens, as_float, linear.finishing(), y, threads_);
    }

    // Products of a slot into work_.y; output(...) finds them there.
    void multiply(const Slot& slot, const float* x) {
        float* y = work_.y.get();
        for (const Linear& linear : slot.linears) {
            multiply(linear, x, count_, y);
            y += count_ * linear.stored.out_features;
        }
    }

    // The finished outputs of layer `index` of a slot for a token.
    float* finish(const Slot& slot, int64_t index, int64_t m, const std::vector<float>& bias) {
        float* y = work_.y.get();
        auto linear = slot.linears.begin();
        for (; index >= static_cast<int64_t>(linear->parts.size()); linear++) {
            index -= static_cast<int64_t>(linear->parts.size());
            y += count_ * linear->stored.out_features;
        }
        const Part& part = linear->parts[static_cast<size_t>(index)];
        y += m * linear->stored.out_features;
        linear->finish(kernels_, count_, part.offset, part.offset + part.outputs, y);
        y += part.offset;
        if (!bias.empty()) kernels_.model->add(bias.data(), part.outputs, y);
        return y;
    }

    // Norm and rotary position of the heads of a token, in place.
    void place(float* heads, int64_t count, int64_t m, const std::vector<float>& norm) {
        const int64_t dim = shape_.head_dim, half = dim / 2;
        for (int64_t h = 0; h < count; h++) {
            float* x = heads + h * dim;
            if (!norm.empty()) kernels_.model->rms_norm(x, norm.data(), dim, shape_.epsilon, x);
            kernels_.model->turn(work_.cosines.get() + m * half, work_.sines.get() + m * half, half, x);
        }
    }

    void attention(int64_t layer) {
        const Block& block = model_.blocks[static_cast<size_t>(layer)];
        const int64_t dim = shape_.head_dim, shared = shape_.heads / shape_.kv_heads;
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        normalize(work_.x.get(), count_, block.attention_norm);
        multiply(block.qkv, work_.normed.get());
        for_tokens(count_, block.qkv.width() * 16, [&](int64_t m) {
            float* q = finish(block.qkv, 0, m, block.biases[kQ]);
            float* k = finish(block.qkv, 1, m, block.biases[kK]);
            const float* v = finish(block.qkv, 2, m, block.biases[kV]);
            place(q, shape_.heads, m, block.q_norm);
            place(k, shape_.kv_heads, m, block.k_norm);
            for (int64_t i = 0; i < shape_.heads * dim; i++) q[i] *= scale;
            std::copy_n(q, shape_.heads * dim, work_.mixed.get() + m * shape_.heads * dim);
            for (int64_t h = 0; h < shape_.kv_heads; h++) place_of(m).cache->write(kernels_, layer, h, place_of(m).position, k + h * dim, v + h * dim);
        });
        int64_t seen = 0;
        for (const Place& place : places_) seen = std::max(seen, place.position + 1);
        if (block.window > 0) seen = std::min(block.window, seen);
        const int threads = worthwhile_threads(threads_, seen * dim * shared * 4, count_ * shape_.kv_heads);
        parallel_for(threads, count_ * shape_.kv_heads, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                const int64_t m = i / shape_.kv_heads, h = i % shape_.kv_heads, position = place_of(m).position;
                const int64_t begin = block.window > 0 ? std::max<int64_t>(0, position - block.window + 1) : 0;
                float* rows = work_.mixed.get() + (m * shape_.heads + h * shared) * dim;
                const Cache& cache = *place_of(m).cache;
                kernels_.model->attend[cache.type](
                    {rows, shared, dim, begin, position, cache.pages(), cache.keys(layer, h), cache.values(layer, h), cache.scales(layer, h), rows});
            }
        });
        multiply(block.out, work_.mixed.get());
        add_outputs(block.out, block.biases[kOut]);
    }

    void feed_forward(const Block& block) {
        normalize(work_.x.get(), count_, block.mlp_norm);
        multiply(block.gate_up, work_.normed.get());
        for_tokens(count_, block.gate_up.width() * 16, [&](int64_t m) {
            const float* gate = finish(block.gate_up, 0, m, block.biases[kGate]);
            const float* up = finish(block.gate_up, 1, m, block.biases[kUp]);
            kernels_.model->gate(gate, up, shape_.intermediate, work_.mixed.get() + m * shape_.intermediate);
        });
        multiply(block.down, work_.mixed.get());
        add_outputs(block.down, block.biases[kDown]);
    }

    void add_outputs(const Slot& slot, const std::vector<float>& bias) {
        for_tokens(count_, slot.width() * 16, [&](int64_t m) {
            kernels_.model->add(finish(slot, 0, m, bias), shape_.hidden, work_.x.get() + m * shape_.hidden);
        });
    }

    const Place& place_of(int64_t token) const { return places_[static_cast<size_t>(token)]; }

    const KernelTable& kernels_;
    Model& model_;
    const septet_model_shape& shape_;
    Workspace& work_;
    const int32_t* tokens_;
    const std::vector<Place>& places_;
    int64_t count_;
    int threads_;
};

}  // namespace

void append_tokens(const KernelTable& kernels, Model& model, Text& text, const int32_t* tokens, int64_t count, int64_t wanted, float* logits, int threads) {
    const int64_t before = text.length;
    const AwakeThreads awake(threads);
    text.cache.grow(before + count);
    model.work.reserve(model, std::min(count, kTokensAtOnce));
    try {
        for (int64_t first = 0; first < count; first += kTokensAtOnce) {
            std::vector<Place> places;
            for (int64_t m = first; m < std::min(count, first + kTokensAtOnce); m++) places.push_back({&text.cache, before + m});
            const int64_t chunk = static_cast<int64_t>(places.size());
            Pass pass(kernels, model, tokens + first, places, threads);
            pass.through_layers();
            const int64_t skipped = std::max<int64_t>(0, count - wanted - first);
            if (skipped < chunk) {
                pass.write_logits(chunk - skipped, logits);
                logits += (chunk - skipped) * model.shape.vocabulary;
            }
            text.length += chunk;
        }
    } catch (const std::bad_alloc&) {
        text.length = before;
        throw;
    }
}

void append_to_each(const KernelTable& kernels, Model& model, Text* const* texts, const int32_t* tokens, int64_t count, float* logits, int threads) {
    const AwakeThreads awake(threads);
    for (int64_t i = 0; i < count; i++) texts[i]->cache.grow(texts[i]->length + 1);
    model.work.reserve(model, std::min(count, kTokensAtOnce));
    for (int64_t first = 0; first < count; first += kTokensAtOnce) {
        std::vector<Place> places;
        for (int64_t m = first; m < std::min(count, first + kTokensAtOnce); m++) places.push_back({&texts[m]->cache, texts[m]->length});
        Pass pass(kernels, model, tokens + first, places, threads);
        pass.through_layers();
        pass.write_logits(static_cast<int64_t>(places.size()), logits + first * model.shape.vocabulary);
    }
    for (int64_t i = 0; i < count; i++) texts[i]->length++;
}

}  // namespace septet
