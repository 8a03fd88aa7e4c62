// Attention over the pages of a cache: scores, softmax and sum of values in one pass that keeps a running maximum.
//
// Included by model_steps.h, once per instruction set.
#pragma once
#include <limits>

#include "lanes.h"
#include "steps.h"

namespace septet {
namespace {

// Vectors of 16 lanes that scores, and sums of values, of four rows may have in registers.
constexpr int kScoresAtOnce = kParts == 1 ? 2 : 1, kValuesAtOnce = kParts == 1 ? 4 : 1;

// Blocks of positions of a page that hold begin .. end - 1.
struct Blocks {
    int64_t first, last;
    Blocks(int64_t begin, int64_t end) : first(begin / kKeyBlock), last((end + kKeyBlock - 1) / kKeyBlock) {}
};

// scores [rows][kPagePositions] of the positions begin .. end - 1 of a page; minus infinity in the rest of their blocks.
template <int type, int rows>
inline void score_page(const char* keys, const float* queries, int64_t dim, int64_t begin, int64_t end, float* scores) {
    const Blocks blocks(begin, end);
    for (int64_t i = blocks.first * kKeyBlock; i < blocks.last * kKeyBlock; i += kScoresAtOnce * kLanes) {
        Floats sum[rows][kScoresAtOnce], key[kScoresAtOnce];
        repeat<rows, kScoresAtOnce>([&](auto r, auto v) { sum[r][v] = Floats{}; });
        const int64_t block = i / kKeyBlock * dim * kKeyBlock, inside = i % kKeyBlock;
        for (int64_t d = 0; d < dim; d++) {
            repeat<kScoresAtOnce>([&](auto v) { load_stored<type>(key[v], keys, block + d * kKeyBlock + inside + v * kLanes); });
            repeat<rows, kScoresAtOnce>([&](auto r, auto v) { sum[r][v].add_product(key[v], queries[r * dim + d]); });
        }
        repeat<rows, kScoresAtOnce>([&](auto r, auto v) { store(sum[r][v], scores + r * kPagePositions + i + v * kLanes); });
    }
    constexpr float never = -std::numeric_limits<float>::infinity();
    for (int r = 0; r < rows; r++) {
        for (int64_t i = blocks.first * kKeyBlock; i < begin; i++) scores[r * kPagePositions + i] = never;
        for (int64_t i = end; i < blocks.last * kKeyBlock; i++) scores[r * kPagePositions + i] = never;
    }
}

// Scores of a page -> e^(score - maximum so far), in place. Returns the factor for everything summed up before.
inline float soften_page(float* scores, const Blocks& blocks, float& maximum, float& total) {
    Floats most, sums{};
    most.set([&](FloatPart& y, int) { y = FloatPart{} + maximum; });
    for (int64_t i = blocks.first * kKeyBlock; i < blocks.last * kKeyBlock; i += kLanes) {
        Floats s;
        load(s, scores + i);
        most.set([&](FloatPart& y, int part) { y = s.part[part] > y ? s.part[part] : y; });
    }
    float highest = maximum, lanes[kLanes];
    store(most, lanes);
    for (float lane : lanes) highest = lane > highest ? lane : highest;
    for (int64_t i = blocks.first * kKeyBlock; i < blocks.last * kKeyBlock; i += kLanes) {
        Floats s;
        load(s, scores + i);
        s -= highest;
        exponential(s);
        sums += s;
        store(s, scores + i);
    }
    const float factor = exponential_of(maximum - highest);
    total = total * factor + sum_of_lanes(sums);
    maximum = highest;
    return factor;
}

// sums [rows][padded dim] = sums * factor + weights @ values, over the positions begin .. end - 1 of a page.
template <int type, int rows>
inline void add_values(const char* values, const float* weights, const float* factors, int64_t dim, int64_t begin, int64_t end, float* sums) {
    const int64_t width = padded_dim(dim);
    in_blocks<kValuesAtOnce>(width / kLanes, [&](auto vector_count, int64_t first) {
        constexpr int vectors = decltype(vector_count)::value;
        Floats sum[rows][vectors], value[vectors];
        repeat<rows, vectors>([&](auto r, auto v) {
            load(sum[r][v], sums + r * width + (first + v) * kLanes);
            sum[r][v] *= factors[r];
        });
        for (int64_t position = begin; position < end; position++) {
            repeat<vectors>([&](auto v) { load_stored<type>(value[v], values, position * width + (first + v) * kLanes); });
            repeat<rows, vectors>([&](auto r, auto v) { sum[r][v].add_product(value[v], weights[r * kPagePositions + position]); });
        }
        repeat<rows, vectors>([&](auto r, auto v) { store(sum[r][v], sums + r * width + (first + v) * kLanes); });
    });
}

// A block of keys and values of a kInt8 page as floats, laid out like a page of kFloat32 that begins with it.
struct FloatBlock {
    alignas(64) float keys[kMaxHeadDim * kKeyBlock], values[kKeyBlock * kMaxHeadDim];

    // Not inlined: once per set is enough.
    [[gnu::noinline]] void widen(const Attention& a, const char* page, int64_t first) {
        const int64_t width = padded_dim(a.dim);
        const int8_t* key = reinterpret_cast<const int8_t*>(page + a.keys) + first * a.dim;
        const int8_t* value = reinterpret_cast<const int8_t*>(page + a.values) + first * width;
        float scales[2][kKeyBlock];
        for (int64_t i = 0; i < 2; i++) std::memcpy(scales[i], page + a.scales + (i * kPagePositions + first) * static_cast<int64_t>(sizeof(float)), sizeof scales[i]);
        for (int64_t d = 0; d < a.dim; d++)
            for (int64_t i = 0; i < kKeyBlock; i++) keys[d * kKeyBlock + i] = static_cast<float>(key[d * kKeyBlock + i]) * scales[0][i];
        for (int64_t i = 0; i < kKeyBlock; i++)
            for (int64_t d = 0; d < width; d++) values[i * width + d] = static_cast<float>(value[i * width + d]) * scales[1][i];
    }
};

// kFloat32 is for kInt8 too, a block at a time.
template <int type>
[[gnu::flatten]] void attend(const Attention& a) {
    FloatBlock block;
    in_blocks<4>(a.rows, [&](auto row_count, int64_t first_row) {
        constexpr int rows = decltype(row_count)::value;
        alignas(64) float scores[rows * kPagePositions], sums[rows * kMaxHeadDim] = {};
        float maximum[rows], total[rows] = {}, factors[rows];
        for (float& m : maximum) m = -std::numeric_limits<float>::infinity();
        const float* queries = a.queries + first_row * a.dim;
        const int64_t piece = a.scales == 0 ? kPagePositions : kKeyBlock;
        for (int64_t start = a.first / piece * piece; start <= a.last; start += piece) {
            const int64_t begin = a.first > start ? a.first - start : 0, end = a.last - start < piece ? a.last - start + 1 : piece;
            const char* page = a.pages[start / kPagePositions];
            const char* keys = page + a.keys;
            const char* values = page + a.values;
            if (type == kFloat32 && a.scales != 0) {
                block.widen(a, page, start % kPagePositions);
                keys = reinterpret_cast<const char*>(block.keys);
                values = reinterpret_cast<const char*>(block.values);
            }
            score_page<type, rows>(keys, queries, a.dim, begin, end, scores);
            for (int r = 0; r < rows; r++) factors[r] = soften_page(scores + r * kPagePositions, Blocks(begin, end), maximum[r], total[r]);
            add_values<type, rows>(values, scores, factors, a.dim, begin, end, sums);
        }
        for (int r = 0; r < rows; r++)
            for (int64_t d = 0; d < a.dim; d++) a.out[(first_row + r) * a.dim + d] = sums[r * padded_dim(a.dim) + d] / total[r];
    });
}

}  // namespace
}  // namespace septet
