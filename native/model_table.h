// What a model needs around its linear layers, per instruction set. The functions are plain vector code, compiled once per set, so that all sets give the same bits.
#pragma once
#include <cstdint>

#include "kernel_table.h"

namespace septet {

// How floats are stored: dense weights (not kInt8), and the key-value cache (not kBfloat16). kInt8: quantized like activations, a scale per vector.
enum FloatType { kFloat32, kFloat16, kBfloat16, kInt8 };
constexpr int64_t float_bytes(int type) { return type == kFloat32 ? 4 : type == kInt8 ? 1 : 2; }

// The cache is cut into pages of kPagePositions positions. In a page, per layer and key-value head: keys [kPagePositions / kKeyBlock][dim][kKeyBlock], so that
// scores of neighbouring positions are neighbouring lanes; then values [kPagePositions][padded dim]; for kInt8 then float32 scales [kPagePositions] of the
// keys, and of the values.
constexpr int64_t kPagePositions = 256, kKeyBlock = 32, kLanes = 16, kMaxHeadDim = 256;
constexpr int64_t padded_dim(int64_t dim) { return (dim + kLanes - 1) / kLanes * kLanes; }

// One token and the query heads that share a key-value head.
struct Attention {
    const float* queries;       // [rows][dim], already scaled
    int64_t rows, dim;
    int64_t first, last;        // positions to look at, both included
    const char* const* pages;   // of the cache
    int64_t keys, values, scales;  // bytes from the begin of a page; scales 0: the cache is not kInt8
    float* out;                 // [rows][dim]
};

struct ModelSteps {
    // y = x / sqrt(mean(x^2) + epsilon) * weight.
    void (*rms_norm)(const float* x, const float* weight, int64_t count, float epsilon, float* y);
    void (*add)(const float* x, int64_t count, float* y);  // y = y + x
    // y = gate * sigmoid(gate) * up.
    void (*gate)(const float* gate, const float* up, int64_t count, float* y);
    // The pairs (x[i], x[half + i]) turned by the angles whose cosines and sines are given.
    void (*turn)(const float* cosines, const float* sines, int64_t half, float* x);
    void (*attend[4])(const Attention& attention);  // by type of the cache
    // Floats <-> stored values; narrow knows kFloat32 and kFloat16.
    void (*widen)(int type, const void* stored, int64_t count, float* y);
    void (*narrow)(int type, const float* x, int64_t count, void* stored);
    // sums [x.count][rows] = weight [rows][features] @ x, in an order of inputs that does not depend on the counts.
    void (*dense_product)(int type, const void* weight, int64_t rows, int64_t features, FloatRows x, float* sums);
};

}  // namespace septet
