// A decoder of the Llama family: its weights, its cache and its forward pass.
//
// Weights are copied once, the products of one input side by side, in the order of use and into huge pages where the system gives them.
#pragma once
#include <deque>
#include <mutex>
#include <vector>

#include "layers.h"
#include "model_table.h"

namespace septet {

// Memory for weights, 64-byte aligned, given back all at once.
class Arena {
public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena();
    char* allocate(int64_t bytes);  // throws std::bad_alloc
    int64_t used() const { return used_; }

private:
    std::vector<char*> chunks_;
    int64_t left_ = 0, used_ = 0;
    char* next_ = nullptr;
};

// Layers with the same inputs as one product.
struct Linear {
    septet_layer stored{};
    std::vector<Part> parts;

    // Layers that `share_inputs`; copies them, in the order that the kernels in use now have for them.
    Linear(Arena& arena, const septet_layer* const* layers, int count);
    Layer layer() const { return Layer(stored); }
    Finishing finishing() const { return {parts.data(), static_cast<int64_t>(parts.size()), stored.scale}; }
    // Outputs first .. last - 1 of a token among `tokens`, rotated and scaled, in place; those of a single one are so when multiplied.
    void finish(const KernelTable& kernels, int64_t tokens, int64_t first, int64_t last, float* y) const {
        if (tokens > 1 && stored.code == SEPTET_TRELLIS) finishing().finish(kernels, first, last, y);
    }
};

bool share_inputs(const septet_layer& a, const septet_layer& b);

// The layers of a slot, in as few products as possible.
struct Slot {
    std::vector<Linear> linears;

    bool is_set() const { return !linears.empty(); }
    void set(Arena& arena, const septet_layer* const* layers, int count);
    int64_t width() const;  // floats of all outputs of a token
};

enum { kQ, kK, kV, kOut, kGate, kUp, kDown, kBiases };

struct Block {
    Slot qkv, out, gate_up, down;
    std::vector<float> attention_norm, mlp_norm, q_norm, k_norm, biases[kBiases];
    int64_t window = 0;
};

// Keys and values of all layers, a page of positions at a time.
class Cache {
public:
    explicit Cache(const septet_model_shape& shape);
    Cache(const Cache&) = delete;
    Cache& operator=(const Cache&) = delete;
    void grow(int64_t positions);  // throws std::bad_alloc
    void shrink(int64_t positions);
    const char* const* pages() const { return pages_.data(); }
    int64_t keys(int64_t layer, int64_t head) const { return (layer * heads_ + head) * head_bytes_; }
    int64_t values(int64_t layer, int64_t head) const { return keys(layer, head) + kPagePositions * dim_ * float_bytes(type); }
    // Of kInt8: scales of the keys, then of the values; else 0.
    int64_t scales(int64_t layer, int64_t head) const { return type == kInt8 ? values(layer, head) + kPagePositions * padded_dim(dim_) : 0; }
    int64_t bytes() const { return static_cast<int64_t>(pages_.size()) * page_bytes_; }
    void write(const KernelTable& kernels, int64_t layer, int64_t head, int64_t position, const float* key, const float* value);
    ~Cache() { shrink(0); }

    const int type;

private:
    std::vector<char*> pages_;
    const int64_t heads_, dim_, head_bytes_, page_bytes_;
};

// One of the texts of an engine.
struct Text {
    explicit Text(const septet_model_shape& shape) : cache(shape) {}
    Cache cache;
    int64_t length = 0;
};

struct Model;

// Intermediate results of `tokens` tokens.
struct Workspace {
    int64_t tokens = 0;
    Array<float> x, normed, y, mixed, cosines, sines, rotated, scales;
    Array<int8_t> values;
    void reserve(const Model& model, int64_t count);
};

struct Model {
    septet_model_shape shape;
    Arena arena;
    Slot embedding, head;
    std::vector<float> frequencies, final_norm;
    std::vector<Block> blocks;
    std::deque<Text> texts;
    Workspace work;
    std::mutex mutex;

    const Slot& output() const { return head.is_set() ? head : embedding; }
    bool is_complete() const;
    // Every slot of the model.
    template <class Body> void for_slots(const Body& body) const {
        body(embedding);
        if (head.is_set()) body(head);
        for (const Block& block : blocks) { body(block.qkv); body(block.out); body(block.gate_up); body(block.down); }
    }
};

// Appends checked tokens and writes the logits after the last `wanted`; throws std::bad_alloc, and then nothing is appended.
void append_tokens(const KernelTable& kernels, Model& model, Text& text, const int32_t* tokens, int64_t count, int64_t wanted, float* logits, int threads);
// The same for one token of each of `count` different texts, and the logits after all of them.
void append_to_each(const KernelTable& kernels, Model& model, Text* const* texts, const int32_t* tokens, int64_t count, float* logits, int threads);

}  // namespace septet

struct septet_engine { septet::Model model; };
