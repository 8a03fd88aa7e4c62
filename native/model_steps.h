// The steps of model_table.h in vectors of 16 lanes (lanes.h).
//
// Lanes are added in a fixed order and nothing is fused, so every set gives the same bits, and so does any batch. Included once per set; the anonymous
// namespace keeps the copies apart.
#pragma once
#include <limits>

#include "attention_steps.h"
#include "model_table.h"

namespace septet {
namespace {

void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* y) {
    Floats sums{};
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Floats v;
        load(v, x + i);
        sums.add_product(v, v);
    }
    float rest = 0;
    for (int64_t j = i; j < count; j++) rest += x[j] * x[j];
    const float factor = 1.0f / __builtin_sqrtf((sum_of_lanes(sums) + rest) / static_cast<float>(count) + epsilon);
    for (int64_t j = 0; j < count; j++) y[j] = x[j] * factor * weight[j];
}

void add(const float* x, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i++) y[i] += x[i];
}

inline void gate_lanes(const Floats& gates, const Floats& up, Floats& y) {
    y.set([&](FloatPart& part, int i) {
        FloatPart e = -gates.part[i];
        exponential(e);
        part = gates.part[i] / (e + 1.0f) * up.part[i];
    });
}

void gate(const float* gates, const float* up, int64_t count, float* y) {
    Floats g, u, result;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        load(g, gates + i);
        load(u, up + i);
        gate_lanes(g, u, result);
        store(result, y + i);
    }
    if (i == count) return;
    load_some<kFloat32>(g, gates, i, count - i);
    load_some<kFloat32>(u, up, i, count - i);
    gate_lanes(g, u, result);
    std::memcpy(y + i, &result, static_cast<size_t>(count - i) * sizeof(float));
}

void turn(const float* cosines, const float* sines, int64_t half, float* x) {
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[half + i] = b * cosines[i] + a * sines[i];
    }
}

template <int type>
void widen_with(const void* stored, int64_t count, float* y) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Floats v;
        load_stored<type>(v, stored, i);
        store(v, y + i);
    }
    if (i == count) return;
    Floats v;
    load_some<type>(v, stored, i, count - i);
    std::memcpy(y + i, &v, static_cast<size_t>(count - i) * sizeof(float));
}

void widen_stored(int type, const void* stored, int64_t count, float* y) {
    if (type == kFloat32) widen_with<kFloat32>(stored, count, y);
    else if (type == kFloat16) widen_with<kFloat16>(stored, count, y);
    else widen_with<kBfloat16>(stored, count, y);
}

// To the nearest float16, ties to even; too large values become infinite.
inline uint16_t half_of(float x) {
    constexpr int32_t infinity = 0x7F800000, overflow = 0x477FF000, smallest_normal = 0x38800000;
    const int32_t bits = bits_of(x), magnitude = bits & 0x7FFFFFFF, sign = bits >> 16 & 0x8000;
    const int32_t normal = ((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - (112 << 10);
    const int32_t small = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // 2^-24, the step of tiny float16 numbers, is the last bit of 0.5
    const int32_t finite = magnitude < smallest_normal ? small : magnitude >= overflow ? 0x7C00 : normal;
    return static_cast<uint16_t>(sign | (magnitude > infinity ? 0x7E00 : finite));
}

void narrow(int type, const float* x, int64_t count, void* stored) {
    if (type == kFloat32) {
        std::memcpy(stored, x, static_cast<size_t>(count) * sizeof(float));
        return;
    }
    uint16_t* to = static_cast<uint16_t*>(stored);
    for (int64_t i = 0; i < count; i++) to[i] = half_of(x[i]);
}

template <int type>
[[gnu::flatten]] void dense_product_with(const char* weight, int64_t rows, int64_t features, FloatRows x, float* sums) {
    in_blocks<4>(rows, [&](auto row_block, int64_t row) {
        in_blocks<kParts == 1 ? 4 : 1>(x.count, [&](auto token_block, int64_t token) {
            constexpr int row_count = decltype(row_block)::value, tokens = decltype(token_block)::value;
            Floats sum[row_count][tokens], input[tokens];
            repeat<row_count, tokens>([&](auto r, auto m) { sum[r][m] = Floats{}; });
            const auto add_products = [&](int64_t k, int64_t valid) {
                repeat<tokens>([&](auto m) { load_some<kFloat32>(input[m], x.data + (token + m) * x.stride, k, valid); });
                repeat<row_count>([&](auto r) {
                    const char* from = weight + (row + r) * features * float_bytes(type);
                    prefetch_ahead(from + k * float_bytes(type));
                    Floats w;
                    load_some<type>(w, from, k, valid);
                    repeat<tokens>([&](auto m) { sum[r][m].add_product(w, input[m]); });
                });
            };
            int64_t k = 0;
            for (; k + kLanes <= features; k += kLanes) add_products(k, kLanes);
            if (k < features) add_products(k, features - k);
            repeat<row_count, tokens>([&](auto r, auto m) { sums[(token + m) * rows + row + r] = sum_of_lanes(sum[r][m]); });
        });
    });
}

void dense_product(int type, const void* weight, int64_t rows, int64_t features, FloatRows x, float* sums) {
    const char* bytes = static_cast<const char*>(weight);
    if (type == kFloat32) dense_product_with<kFloat32>(bytes, rows, features, x, sums);
    else if (type == kFloat16) dense_product_with<kFloat16>(bytes, rows, features, x, sums);
    else dense_product_with<kBfloat16>(bytes, rows, features, x, sums);
}

constexpr ModelSteps kModelSteps = {rms_norm, add, gate, turn, {attend<kFloat32>, attend<kFloat16>, nullptr, attend<kFloat32>}, widen_stored, narrow, dense_product};

}  // namespace
}  // namespace septet
