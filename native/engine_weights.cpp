// Where an engine keeps its weights and its cache.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "engine.h"

namespace septet {
namespace {

constexpr int64_t kHugePage = 1 << 21, kChunk = 16 * kHugePage, kAlignment = 64, kScaleBytes = sizeof(float);

int64_t round_up(int64_t value, int64_t step) { return ceil_divide(value, step) * step; }

float* copy(Arena& arena, const float* from, int64_t count) {
    float* to = reinterpret_cast<float*>(arena.allocate(count * static_cast<int64_t>(sizeof(float))));
    std::copy_n(from, count, to);
    return to;
}

// Arrays [rows][outputs of each layer] side by side: [rows][all outputs].
float* join(Arena& arena, const septet_layer* const* layers, const std::vector<Part>& parts, int64_t width, const float* septet_layer::*array) {
    const bool split = layers[0]->code == SEPTET_SPLIT;
    const Layer first(*layers[0]);
    const int64_t rows = split ? 2 * first.segments() : 1;
    float* joined = reinterpret_cast<float*>(arena.allocate(rows * width * static_cast<int64_t>(sizeof(float))));
    std::fill_n(joined, rows * width, 0.0f);
    for (size_t i = 0; i < parts.size(); i++) {
        const int64_t count = split ? Layer(*layers[i]).outputs : layers[i]->out_features;
        for (int64_t row = 0; row < rows; row++) std::copy_n(layers[i]->*array + row * count, count, joined + row * width + parts[i].offset);
    }
    return joined;
}

}  // namespace

Arena::~Arena() {
    for (char* chunk : chunks_) std::free(chunk);
}

char* Arena::allocate(int64_t bytes) {
    bytes = round_up(bytes, kAlignment);
    if (bytes > left_) {
        const int64_t size = round_up(std::max(bytes, kChunk), kHugePage);
        chunks_.reserve(chunks_.size() + 1);
        char* chunk = static_cast<char*>(std::aligned_alloc(static_cast<size_t>(kHugePage), static_cast<size_t>(size)));
        if (chunk == nullptr) throw std::bad_alloc();
        chunks_.push_back(chunk);
#if defined(__linux__)
        madvise(chunk, static_cast<size_t>(size), MADV_HUGEPAGE);  // a wish: it may fail
#endif
        next_ = chunk;
        left_ = size;
    }
    char* result = next_;
    next_ += bytes;
    left_ -= bytes;
    used_ += bytes;
    return result;
}

bool share_inputs(const septet_layer& a, const septet_layer& b) {
    const bool same = a.code == b.code && (!is_tiled(a.code) || a.bits == b.bits) && a.in_features == b.in_features && a.input_block == b.input_block &&
                      a.group_size == b.group_size && a.segment == b.segment && a.arranged_for == b.arranged_for && (a.offset == nullptr) == (b.offset == nullptr);
    if (!same || (a.input_scale == nullptr) != (b.input_scale == nullptr)) return false;
    return a.input_scale == nullptr || std::memcmp(a.input_scale, b.input_scale, static_cast<size_t>(a.in_features) * sizeof(float)) == 0;
}

Linear::Linear(Arena& arena, const septet_layer* const* layers, int count) : stored(*layers[0]) {
    int64_t bytes = 0;
    stored.out_features = 0;
    for (int i = 0; i < count; i++) {
        parts.push_back({stored.out_features, layers[i]->out_features, layers[i]->output_block});
        stored.out_features += Layer(*layers[i]).outputs;
        bytes += weight_bytes(*layers[i]);
    }
    stored.output_block = 1;
    char* weight = arena.allocate(bytes);
    stored.weight = weight;
    int error;
    const KernelTable* kernels = active_kernels(&error);
    for (int i = 0; i < count; i++) {
        stored.arranged_for = copy_weights(kernels, *layers[i], weight);  // the same for all: their inputs and segments are
        weight += weight_bytes(*layers[i]);
    }
    if (stored.input_scale != nullptr) stored.input_scale = copy(arena, stored.input_scale, stored.in_features);
    if (is_dense(stored.code)) return;
    stored.scale = join(arena, layers, parts, stored.out_features, &septet_layer::scale);
    if (stored.code == SEPTET_SPLIT && stored.offset != nullptr) stored.offset = join(arena, layers, parts, stored.out_features, &septet_layer::offset);
}

void Slot::set(Arena& arena, const septet_layer* const* layers, int count) {
    std::vector<Linear> made;
    for (int first = 0, last; first < count; first = last) {
        for (last = first + 1; last < count && share_inputs(*layers[first], *layers[last]);) last++;
        made.emplace_back(arena, layers + first, last - first);
    }
    linears = std::move(made);
}

int64_t Slot::width() const {
    int64_t width = 0;
    for (const Linear& linear : linears) width += linear.stored.out_features;
    return width;
}

Cache::Cache(const septet_model_shape& shape)
    : type(shape.cache == SEPTET_FLOAT32 ? kFloat32 : shape.cache == SEPTET_INT8 ? kInt8 : kFloat16), heads_(shape.kv_heads), dim_(shape.head_dim),
      head_bytes_(kPagePositions * ((dim_ + padded_dim(dim_)) * float_bytes(type) + (type == kInt8 ? 2 * kScaleBytes : 0))),
      page_bytes_(shape.layers * heads_ * head_bytes_) {}

void Cache::grow(int64_t positions) {
    const size_t needed = static_cast<size_t>(ceil_divide(positions, kPagePositions));
    pages_.reserve(needed);
    while (pages_.size() < needed) {
        char* page = static_cast<char*>(std::calloc(static_cast<size_t>(page_bytes_), 1));
        if (page == nullptr) throw std::bad_alloc();
        pages_.push_back(page);
    }
}

void Cache::shrink(int64_t positions) {
    for (const size_t needed = static_cast<size_t>(ceil_divide(positions, kPagePositions)); pages_.size() > needed; pages_.pop_back()) std::free(pages_.back());
}

void Cache::write(const KernelTable& kernels, int64_t layer, int64_t head, int64_t position, const float* key, const float* value) {
    char* page = pages_[static_cast<size_t>(position / kPagePositions)];
    const int64_t at = position % kPagePositions, size = float_bytes(type);
    char* value_to = page + values(layer, head) + at * padded_dim(dim_) * size;
    alignas(64) char narrow[kMaxHeadDim * sizeof(float)];
    if (type == kInt8) {
        const float found[2] = {kernels.quantize(key, dim_, reinterpret_cast<int8_t*>(narrow)), kernels.quantize(value, dim_, reinterpret_cast<int8_t*>(value_to))};
        for (int64_t i = 0; i < 2; i++) std::memcpy(page + scales(layer, head) + (i * kPagePositions + at) * kScaleBytes, &found[i], kScaleBytes);
    } else {
        kernels.model->narrow(type, value, dim_, value_to);
        kernels.model->narrow(type, key, dim_, narrow);
    }
    char* to = page + keys(layer, head) + (at / kKeyBlock * dim_ * kKeyBlock + at % kKeyBlock) * size;
    for (int64_t d = 0; d < dim_; d++) {
        if (type == kFloat32) std::memcpy(to + d * kKeyBlock * 4, narrow + d * 4, 4);
        else if (type == kFloat16) std::memcpy(to + d * kKeyBlock * 2, narrow + d * 2, 2);
        else to[d * kKeyBlock] = narrow[d];
    }
}

void Workspace::reserve(const Model& model, int64_t count) {
    if (count <= tokens) return;
    const septet_model_shape& shape = model.shape;
    int64_t inputs = 1, segments = 1, width = 1;
    model.for_slots([&](const Slot& slot) {
        if (&slot != &model.output() && &slot != &model.embedding) width = std::max(width, slot.width());
        for (const Linear& linear : slot.linears) {
            inputs = std::max(inputs, linear.layer().inputs);
            segments = std::max(segments, linear.layer().segments());
        }
    });
    tokens = 0;
    x = make_array<float>(count * shape.hidden);
    normed = make_array<float>(count * shape.hidden);
    y = make_array<float>(count * width);
    mixed = make_array<float>(count * std::max(shape.heads * shape.head_dim, shape.intermediate));
    cosines = make_array<float>(count * shape.head_dim / 2);
    sines = make_array<float>(count * shape.head_dim / 2);
    rotated = make_array<float>(count * inputs);
    values = make_array<int8_t>(count * inputs);
    scales = make_array<float>(count * segments);
    tokens = count;
}

bool Model::is_complete() const {
    bool complete = embedding.is_set() && !frequencies.empty() && !final_norm.empty();
    for (const Block& block : blocks) {
        complete = complete && block.qkv.is_set() && block.out.is_set() && block.gate_up.is_set() && block.down.is_set();
        complete = complete && !block.attention_norm.empty() && !block.mlp_norm.empty();
    }
    return complete;
}

}  // namespace septet
