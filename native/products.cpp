// Products with packed weights: a row of tiles at a time, segment by segment, exact in int32, then one float step per segment.
//
// Few tokens: the kernel decodes and multiplies in one pass. More: tiles are decoded once into a small buffer that all tokens then use.
// Rows of tiles are independent of each other, so they are what threads share out.
#include "products.h"

#include <algorithm>
#include <cstring>

#include "model_table.h"

namespace septet {
namespace {

constexpr int64_t kChunkTiles = 64;        // decoded at once: 16 KiB of int8
constexpr int64_t kFloatChunkTiles = 32;   // 32 KiB of float32
constexpr int64_t kTokenBlock = 128;       // tokens that share one decoding: 32 KiB of sums
constexpr int64_t kRowBlock = 64;          // rows of an int8 matrix at once
constexpr int64_t kManyRows = 16;          // of tiles for each thread: then threads share groups of kStreams
constexpr int64_t kWeightsPerThread = 1 << 19, kWeightsPerAwakeThread = 1 << 15;  // below this, waking a thread costs more than it brings
constexpr int64_t kWeightsPerPart = 1 << 18;  // more parts even out threads of unequal speed; parts that take microseconds would cost more

// Inputs of one segment: whole tiles of the weights, and where they begin in the activations.
struct Piece { int64_t first_tile, tiles, offset; };

// int8 activations cut into segments; `per_token` rows for each token.
class Segments {
public:
    Segments(const KernelTable& kernels, const int8_t* values, int64_t tokens, int64_t inputs, int64_t segment, bool split)
        : per_token_(split ? 2 : 1), inputs_(inputs), segment_(std::min(segment, inputs)), count_(ceil_divide(inputs, segment_)),
          rows_{values, inputs, tokens * per_token_}, sums_(make_array<int32_t>(tokens * count_ * 2)) {
        if (!is_aligned()) align(tokens);
        for (int64_t m = 0; m < tokens; m++)
            for (int64_t s = 0; s < count_; s++) {
                const Piece p = piece(s);
                kernels.pair_sums(rows_.data + m * rows_.stride + p.offset, p.tiles * kTileInputs, &sums_[(m * count_ + s) * 2]);
            }
        if (split) separate(tokens);
    }

    int64_t per_token() const { return per_token_; }
    int64_t count() const { return count_; }
    int64_t tokens() const { return rows_.count / per_token_; }

    Piece piece(int64_t s) const {
        const int64_t begin = s * segment_, end = std::min(begin + segment_, inputs_);
        const int64_t first = begin / kTileInputs, last = ceil_divide(end, kTileInputs);
        return {first, last - first, is_aligned() ? begin : s * aligned_segment()};
    }
    Rows rows(int64_t first_token, int64_t tokens, const Piece& p) const {
        return {rows_.data + first_token * per_token_ * rows_.stride + p.offset, rows_.stride, tokens * per_token_};
    }
    // Sums of the activations of a segment over even and odd inputs.
    const int32_t* sums(int64_t m, int64_t s) const { return &sums_[(m * count_ + s) * 2]; }

private:
    bool is_aligned() const { return segment_ % kTileInputs == 0 || count_ == 1; }
    // Enough for the tiles that a segment touches, wherever it begins.
    int64_t aligned_segment() const { return (segment_ / kTileInputs + 2) * kTileInputs; }

    // Segments that cut tiles (only odd sizes have them) get copies of their tiles' activations, 0 outside the segment.
    void align(int64_t tokens) {
        const int64_t stride = count_ * aligned_segment();
        Array<int8_t> copy = make_array<int8_t>(tokens * stride);
        std::memset(copy.get(), 0, static_cast<size_t>(tokens * stride));
        for (int64_t m = 0; m < tokens; m++)
            for (int64_t k = 0; k < inputs_; k++) {
                const Piece p = piece(k / segment_);
                copy[m * stride + p.offset + k - p.first_tile * kTileInputs] = rows_.data[m * rows_.stride + k];
            }
        own_ = std::move(copy);
        rows_ = {own_.get(), stride, tokens};
    }

    // The split code needs the products of even and of odd inputs apart: a row with odd inputs 0 and a row with even inputs 0.
    void separate(int64_t tokens) {
        const int64_t stride = rows_.stride;
        Array<int8_t> copy = make_array<int8_t>(2 * tokens * stride);
        for (int64_t m = 0; m < tokens; m++) {
            const int8_t* from = rows_.data + m * stride;
            int8_t* even = copy.get() + 2 * m * stride;
            int8_t* odd = even + stride;
            for (int64_t k = 0; k < stride; k += 2) {
                even[k] = from[k];
                even[k + 1] = odd[k] = 0;
                odd[k + 1] = from[k + 1];
            }
        }
        own_ = std::move(copy);
        rows_ = {own_.get(), stride, 2 * tokens};
    }

    int64_t per_token_, inputs_, segment_, count_;
    Rows rows_;
    Array<int8_t> own_;
    Array<int32_t> sums_;
};

// sums [x.count][64] += the tiles of a piece @ x.
void accumulate(const KernelTable& kernels, const Matrix& w, int64_t row, const Piece& piece, Rows x, int32_t* sums) {
    if (x.count <= kernels.fused_rows && w.decoding < kStrands6) return kernels.packed_product[w.decoding](w.tile(row, piece.first_tile), piece.tiles, x, sums);
    alignas(64) uint8_t decoded[kChunkTiles * kTileWeights];
    for (int64_t t = 0; t < piece.tiles; t += kChunkTiles) {
        const int64_t tiles = std::min(kChunkTiles, piece.tiles - t);
        kernels.decode[w.decoding](w.tile(row, piece.first_tile + t), tiles, decoded);
        kernels.decoded_product(decoded, tiles, {x.data + t * kTileInputs, x.stride, x.count}, sums);
    }
}

// For every row of tiles, segment and token: finish(row, segment, token, sums), sums [per_token][64], segments in ascending order.
template <class Finish>
void for_each_sum(const KernelTable& kernels, const Matrix& w, const Segments& x, int threads, const Finish& finish) {
    const int32_t bias = w.decoding == kSplit7 ? 0 : kernels.level_bias;
    const int64_t width = x.per_token() * kTileOutputs, block = kTokenBlock / x.per_token();
    parallel_for(threads, w.rows, [&](int64_t first_row, int64_t last_row) {
        alignas(64) int32_t sums[kTokenBlock * kTileOutputs];
        for (int64_t row = first_row; row < last_row; row++)
            for (int64_t first = 0; first < x.tokens(); first += block) {
                const int64_t tokens = std::min(block, x.tokens() - first);
                for (int64_t s = 0; s < x.count(); s++) {
                    const Piece piece = x.piece(s);
                    for (int64_t m = 0; m < tokens; m++) {
                        const int32_t* of_x = x.sums(first + m, s);
                        std::fill_n(sums + m * width, width, -bias * (of_x[0] + of_x[1]));
                    }
                    accumulate(kernels, w, row, piece, x.rows(first, tokens, piece), sums);
                    for (int64_t m = 0; m < tokens; m++) finish(row, s, first + m, sums + m * width);
                }
            }
    });
}

// Where 64 outputs of a row of tiles go; 0 at the first segment.
float* outputs(float* y, const Matrix& w, int64_t token, int64_t row, bool clear) {
    float* at = y + token * w.outputs() + row * kTileOutputs;
    if (clear) std::fill_n(at, kTileOutputs, 0.0f);
    return at;
}

SplitGroup split_group(const septet_split_scales& scales, const Matrix& w, int64_t group, int64_t row) {
    SplitGroup result{};
    for (int field = 0; field < 2; field++) {
        const int64_t at = (2 * group + field) * w.outputs() + row * kTileOutputs;
        result.scale[field] = scales.scale + at;
        result.offset[field] = scales.offset == nullptr ? nullptr : scales.offset + at;
    }
    return result;
}

}  // namespace

int worthwhile_threads(int threads, int64_t weights, int64_t tokens) {
    const int64_t worthwhile = AwakeThreads::exist() ? kWeightsPerAwakeThread : kWeightsPerThread;
    return static_cast<int>(std::min<int64_t>(threads, 1 + weights / worthwhile * std::max<int64_t>(tokens, 1)));
}

namespace {

int parts_per_thread(int threads, int64_t weights, int64_t tokens) {
    return static_cast<int>(std::clamp<int64_t>(weights * tokens / (threads * kWeightsPerPart), kPartsPerThread, kMostParts));
}

// Segments of whole tiles, short enough to lie in a chunk: decoded once for a block of tokens, and no sum goes through memory.
void multiply_segments(const KernelTable& kernels, const Matrix& w, const septet_activations& x, const Segments& segments, float* y, int threads, int parts) {
    const int64_t segment = x.segment / kTileInputs, at_once = kChunkTiles / segment * segment, count = segments.count();
    parallel_for(threads, w.rows, [&](int64_t first_row, int64_t last_row) {
        alignas(64) uint8_t decoded[kChunkTiles * kTileWeights];
        alignas(64) float results[kTokenBlock * kTileOutputs];  // rows of y are so far apart that they would push each other out of the cache
        for (int64_t row = first_row; row < last_row; row++)
            for (int64_t first = 0; first < x.tokens; first += kTokenBlock) {
                const int64_t tokens = std::min(kTokenBlock, x.tokens - first);
                std::fill_n(results, tokens * kTileOutputs, 0.0f);
                for (int64_t t = 0; t < w.columns; t += at_once) {
                    const int64_t tiles = std::min(at_once, w.columns - t);
                    kernels.decode[w.decoding](w.tile(row, t), tiles, decoded);
                    for (int64_t in_chunk = 0; in_chunk < tiles; in_chunk += segment) {
                        const int64_t s = (t + in_chunk) / segment;
                        const Rows rows{x.values + first * w.inputs() + s * x.segment, w.inputs(), tokens};
                        const SegmentedRows segmented{rows, segments.sums(first, s), x.scales + first * count + s, count};
                        kernels.add_decoded(decoded + in_chunk * kTileWeights, std::min(segment, tiles - in_chunk), segmented, results);
                    }
                }
                for (int64_t m = 0; m < tokens; m++)
                    std::copy_n(results + m * kTileOutputs, kTileOutputs, y + (first + m) * w.outputs() + row * kTileOutputs);
            }
    }, parts);
}

}  // namespace

bool Finishing::goes_in_steps(int64_t step) const {
    return std::all_of(parts, parts + count, [&](const Part& part) { return step % part.block == 0 && part.offset % part.block == 0; });
}

void Finishing::finish(const KernelTable& kernels, int64_t first, int64_t last, float* y) const {
    for (int64_t i = 0; i < count; i++) {
        const int64_t begin = std::max(first, parts[i].offset), size = std::min(last, parts[i].offset + parts[i].outputs) - begin;
        if (size <= 0) continue;
        if (parts[i].block > 1) kernels.hadamard(y + begin, size, parts[i].block);
        kernels.multiply(y + begin, scale + begin, size, y + begin);
    }
}

bool trellis_product(const KernelTable& kernels, const Matrix& w, const septet_activations& x, float* y, int threads, const Finishing* finishing) {
    const Segments segments(kernels, x.values, x.tokens, w.inputs(), x.segment, false);
    const int64_t weights = w.inputs() * w.outputs();
    threads = worthwhile_threads(threads, weights, x.tokens);
    const int parts = parts_per_thread(threads, weights, x.tokens);
    const SegmentProduct at_once = kernels.segment_product[w.decoding];
    if (at_once != nullptr && x.tokens == 1 && x.segment % kTileInputs == 0) {
        const SegmentedRow row{x.values, x.segment / kTileInputs, segments.sums(0, 0), x.scales};
        const int64_t unit = w.rows < kManyRows * threads ? 1 : kStreams;
        const bool finishes = finishing != nullptr && finishing->goes_in_steps(unit * kTileOutputs);
        parallel_for(threads, ceil_divide(w.rows, unit), [&](int64_t first, int64_t last) {
            first *= unit;
            last = std::min(last * unit, w.rows);
            at_once({w.tile(first, 0), last - first, w.columns}, row, y + first * kTileOutputs);
            if (finishes) finishing->finish(kernels, first * kTileOutputs, last * kTileOutputs, y);
        }, parts);
        return finishes;
    }
    const bool in_strands = w.decoding >= kStrands6;
    if (in_strands && x.tokens <= kFusedTokens && kernels.tokens_product[w.decoding - kStrands6] != nullptr) {
        const SegmentedRows rows{{x.values, w.inputs(), x.tokens}, segments.sums(0, 0), x.scales, segments.count()};
        parallel_for(threads, w.rows, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                kernels.tokens_product[w.decoding - kStrands6]({w.tile(row, 0), 1, w.columns}, x.segment / kTileInputs, rows, y + row * kTileOutputs, w.outputs());
        }, parts);
        return false;
    }
    if (kernels.add_decoded != nullptr && (in_strands || x.tokens > kernels.fused_rows) && x.segment % kTileInputs == 0 && x.segment / kTileInputs <= kChunkTiles)
        multiply_segments(kernels, w, x, segments, y, threads, parts);
    else
        for_each_sum(kernels, w, segments, threads, [&](int64_t row, int64_t s, int64_t m, const int32_t* sums) {
            kernels.add_segment(sums, x.scales[m * segments.count() + s], outputs(y, w, m, row, s == 0));
        });
    return false;
}

void trellis_sums(const KernelTable& kernels, const Matrix& w, const int8_t* values, int64_t tokens, int32_t* sums, int threads) {
    const Segments segments(kernels, values, tokens, w.inputs(), w.inputs(), false);
    for_each_sum(kernels, w, segments, threads, [&](int64_t row, int64_t, int64_t m, const int32_t* exact) {
        std::copy_n(exact, kTileOutputs, sums + m * w.outputs() + row * kTileOutputs);
    });
}

void split_product(const KernelTable& kernels, const Matrix& w, const septet_split_scales& scales, const septet_activations& x, float* y, int threads) {
    const Segments segments(kernels, x.values, x.tokens, w.inputs(), x.segment, true);
    threads = worthwhile_threads(threads, w.inputs() * w.outputs(), x.tokens);
    for_each_sum(kernels, w, segments, threads, [&](int64_t row, int64_t s, int64_t m, const int32_t* sums) {
        float* at = outputs(y, w, m, row, s == 0);
        kernels.add_split(sums, segments.sums(m, s), split_group(scales, w, s, row), x.scales[m * segments.count() + s], at);
    });
}

void float_product(const KernelTable& kernels, const Matrix& w, const septet_split_scales* scales, FloatRows x, float* y, int threads) {
    const bool symmetric = scales != nullptr && scales->offset == nullptr;
    const int32_t zero[2] = {scales == nullptr ? 128 : symmetric ? 8 : 0, scales == nullptr ? 128 : symmetric ? 4 : 0};
    const uint8_t shift = static_cast<uint8_t>(scales == nullptr ? 128 - kernels.level_bias : 0);
    const int64_t group_tiles = scales == nullptr ? w.columns : std::min(w.columns, scales->group_size / kTileInputs);
    threads = worthwhile_threads(threads, w.inputs() * w.outputs(), x.count);
    parallel_for(threads, w.rows, [&](int64_t first_row, int64_t last_row) {
        alignas(64) uint8_t decoded[kFloatChunkTiles * kTileWeights];
        alignas(64) float values[kFloatChunkTiles * kTileWeights];
        alignas(64) float sums[kTokenBlock * kTileOutputs];
        for (int64_t row = first_row; row < last_row; row++)
            for (int64_t first = 0; first < x.count; first += kTokenBlock) {
                const int64_t tokens = std::min(kTokenBlock, x.count - first);
                std::fill_n(sums, tokens * kTileOutputs, 0.0f);
                for (int64_t t = 0, tiles; t < w.columns; t += tiles) {
                    tiles = std::min({kFloatChunkTiles, w.columns - t, group_tiles - t % group_tiles});
                    kernels.decode[w.decoding](w.tile(row, t), tiles, decoded);
                    kernels.widen(decoded, tiles, shift, zero, values);
                    if (scales != nullptr) kernels.rescale(values, tiles, split_group(*scales, w, t / group_tiles, row));
                    kernels.float_product(values, tiles * kTileInputs, {x.data + first * x.stride + t * kTileInputs, x.stride, tokens}, sums);
                }
                for (int64_t m = 0; m < tokens; m++) std::copy_n(sums + m * kTileOutputs, kTileOutputs, outputs(y, w, first + m, row, false));
            }
    });
}

void row_product(const KernelTable& kernels, const septet_rows& w, const septet_activations& x, float* y, int threads) {
    threads = worthwhile_threads(threads, w.rows * w.features, x.tokens);
    parallel_for(threads, ceil_divide(w.rows, kRowBlock), [&](int64_t first_block, int64_t last_block) {
        alignas(64) int32_t sums[kTokenBlock * kRowBlock];
        for (int64_t row = first_block * kRowBlock; row < std::min(last_block * kRowBlock, w.rows); row += kRowBlock)
            for (int64_t first = 0; first < x.tokens; first += kTokenBlock) {
                const int64_t tokens = std::min(kTokenBlock, x.tokens - first), rows = std::min(kRowBlock, w.rows - row);
                kernels.row_product(w.weight + row * w.features, rows, w.features, {x.values + first * w.features, w.features, tokens}, sums);
                for (int64_t m = 0; m < tokens; m++)
                    for (int64_t r = 0; r < rows; r++)
                        y[(first + m) * w.rows + row + r] = w.scale[row + r] * (x.scales[first + m] * static_cast<float>(sums[m * rows + r]));
            }
    });
}

void float_row_product(const KernelTable& kernels, const septet_rows& w, FloatRows x, float* y, int threads) {
    threads = worthwhile_threads(threads, w.rows * w.features, x.count);
    parallel_for(threads, ceil_divide(w.rows, kRowBlock), [&](int64_t first_block, int64_t last_block) {
        alignas(64) float sums[kTokenBlock * kRowBlock];
        for (int64_t row = first_block * kRowBlock; row < std::min(last_block * kRowBlock, w.rows); row += kRowBlock)
            for (int64_t first = 0; first < x.count; first += kTokenBlock) {
                const int64_t tokens = std::min(kTokenBlock, x.count - first), rows = std::min(kRowBlock, w.rows - row);
                kernels.float_row_product(w.weight + row * w.features, rows, w.features, {x.data + first * x.stride, x.stride, tokens}, sums);
                for (int64_t m = 0; m < tokens; m++)
                    for (int64_t r = 0; r < rows; r++) y[(first + m) * w.rows + row + r] = w.scale[row + r] * sums[m * rows + r];
            }
    });
}

void dense_product(const KernelTable& kernels, const septet_layer& layer, FloatRows x, float* y, int threads) {
    const int type = layer.code == SEPTET_FLOAT32 ? kFloat32 : layer.code == SEPTET_FLOAT16 ? kFloat16 : kBfloat16;
    const char* weight = static_cast<const char*>(layer.weight);
    const int64_t outputs = layer.out_features, row_bytes = layer.in_features * float_bytes(type);
    threads = worthwhile_threads(threads, outputs * layer.in_features, x.count);
    parallel_for(threads, ceil_divide(outputs, kRowBlock), [&](int64_t first_block, int64_t last_block) {
        alignas(64) float sums[kTokenBlock * kRowBlock];
        for (int64_t row = first_block * kRowBlock; row < std::min(last_block * kRowBlock, outputs); row += kRowBlock)
            for (int64_t first = 0; first < x.count; first += kTokenBlock) {
                const int64_t tokens = std::min(kTokenBlock, x.count - first), rows = std::min(kRowBlock, outputs - row);
                kernels.model->dense_product(type, weight + row * row_bytes, rows, layer.in_features, {x.data + first * x.stride, x.stride, tokens}, sums);
                for (int64_t m = 0; m < tokens; m++) std::copy_n(sums + m * rows, rows, y + (first + m) * outputs + row);
            }
    });
}

}  // namespace septet
