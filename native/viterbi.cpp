// The trellis encoder: exact Viterbi search per tile, tail-biting in two passes, in integers only, so that every machine writes the same bytes.
//
// Inputs are quarter levels (int16). The metric of a window with levels T0, T1 is m = 2 (T0^2 + T1^2) - (X0 T0 + X1 T1): twice the squared distance in level
// units, less a part that no choice changes. Pass one searches the tile around its boundary (pairs 96 .. 127, 0 .. 31) and fixes the state at the
// boundary; pass two searches all 128 pairs from that state to that state. codes/trellis_search.py is the definition; the tests compare bytes.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "viterbi.h"

namespace septet {
namespace {

struct Scalar {
    using Type = int32_t;
    static constexpr int lanes = 1, registers_per_tile = 4;
    static Type all(int32_t v) { return v; }
    static Type load(const int32_t* p) { return *p; }
    static void store(int32_t* p, Type v) { *p = v; }
    static void store_low_bytes(uint8_t* p, Type v) { *p = static_cast<uint8_t>(v & 0xFF); }
    static Type add(Type a, Type b) { return a + b; }
    static Type subtract(Type a, Type b) { return a - b; }
    static Type min(Type a, Type b) { return std::min(a, b); }
    static Type bit_and(Type a, Type b) { return a & b; }
    static Type bit_or(Type a, Type b) { return a | b; }
    static Type metric(Type cost, Type input, Type level) {
        const int first = static_cast<int16_t>(level & 0xFFFF), second = level >> 16;
        return cost + (static_cast<int16_t>(input & 0xFFFF) + (first >> 7)) * first + ((input >> 16) + (second >> 7)) * second;
    }
    static Type times_groups(int c, int groups) { return c * groups; }
    static int32_t reduce_min(Type v) { return v; }
};

constexpr int kPairs = 128, kBoundarySteps = 32, kFarState = 1 << 22;  // kFarState: a cost no path from the fixed state can reach

struct Free { void operator()(void* p) const { std::free(p); } };
template <class T> using Buffer = std::unique_ptr<T[], Free>;
template <class T>
Buffer<T> buffer(size_t count) {
    Buffer<T> memory(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

// Search state of one batch of tiles.
class Search {
public:
    Search(const ViterbiTables& tables, const ViterbiKernel& kernel) : tables_(tables), kernel_(kernel), count_(states(tables.bits)),
        costs_(buffer<int32_t>(kBatch * count_)), scratch_(buffer<int32_t>(kBatch * count_)), survivors_(buffer<uint8_t>(kBatch * kPairs * count_)) {}

    // tiles: `count` pointers, at most kBatch, to 256 quarter levels. symbols: as many pointers to 128 symbols.
    void encode(const int16_t* const* tiles, uint8_t* const* symbols, int count) {
        const int bits = tables_.bits;
        batch_ = count;
        int boundary[kBatch];
        start(nullptr);
        run(tiles, kPairs - kBoundarySteps, 2 * kBoundarySteps);
        for (int t = 0; t < batch_; t++) {
            int state = cheapest(t);
            for (int s = 2 * kBoundarySteps - 1; s >= kBoundarySteps; s--) state = window(t, s, state) & (count_ - 1);
            boundary[t] = state;
        }
        start(boundary);
        run(tiles, 0, kPairs);
        for (int t = 0; t < batch_; t++) {
            int state = boundary[t];
            for (int s = kPairs - 1; s >= 0; s--) {
                const int w = window(t, s, state);
                symbols[t][s] = static_cast<uint8_t>(w & ((1 << bits) - 1));
                state = w & (count_ - 1);
            }
        }
    }

private:
    void start(const int* fixed_state) {
        for (int t = 0; t < batch_; t++)
            for (int s = 0; s < count_; s++) {
                const int cost = fixed_state == nullptr || fixed_state[t] == s ? 0 : kFarState;
                costs_[t * count_ + slot_of_state(s, tables_.bits)] = cost << kMetricShift | (s & ((1 << tables_.bits) - 1));
            }
    }

    void run(const int16_t* const* tiles, int first_pair, int steps) {
        for (int s = 0; s < steps; s++) {
            const int pair = (first_pair + s) % kPairs;
            int32_t inputs[kBatch];
            ViterbiStep step{&tables_, costs_.get(), scratch_.get(), inputs, {}};
            for (int t = 0; t < batch_; t++) {
                std::memcpy(&inputs[t], tiles[t] + 2 * pair, sizeof(int32_t));
                step.survivors[t] = survivors_.get() + (t * kPairs + s) * count_;
            }
            kernel_.advance[tables_.bits - 6][batch_ - 1](step);
        }
    }

    int window(int t, int s, int state) const {
        return state << tables_.bits | survivors_[(t * kPairs + s) * count_ + slot_of_state(state, tables_.bits)];
    }

    int cheapest(int t) const {
        int best = 0;
        for (int s = 1; s < count_; s++)
            if ((cost(t, s) >> kMetricShift) < (cost(t, best) >> kMetricShift)) best = s;
        return best;
    }
    int32_t cost(int t, int s) const { return costs_[t * count_ + slot_of_state(s, tables_.bits)]; }

    const ViterbiTables& tables_;
    const ViterbiKernel& kernel_;
    int count_, batch_ = kBatch;
    Buffer<int32_t> costs_, scratch_;
    Buffer<uint8_t> survivors_;
};

}  // namespace

const ViterbiKernel viterbi_scalar = viterbi_kernel<Scalar>();

WidthTables::WidthTables(int bits, const int8_t* window_levels) {
    levels_ = buffer<int32_t>(1 << kWindowBits).release();
    tables_ = {bits, levels_};
    for (int group = 0; group < groups(bits); group++)
        for (int low = 0; low < 1 << bits; low++)
            for (int c = 0; c < 1 << bits; c++) {
                const int w = (group + groups(bits) * c) << bits | low, index = (((group << bits) + low) << bits) + c;
                const int first = window_levels[2 * w], second = window_levels[2 * w + 1];
                const int16_t scaled[2] = {static_cast<int16_t>(-first * 256), static_cast<int16_t>(-second * 256)};
                std::memcpy(&levels_[index], scaled, sizeof scaled);
            }
}

WidthTables::~WidthTables() { std::free(levels_); }

void viterbi_encode(const ViterbiTables& tables, const ViterbiKernel& kernel, const int16_t* fixed, int64_t tiles, uint8_t* symbols) {
    Search search(tables, kernel);
    for (int64_t batches = (tiles + kBatch - 1) / kBatch; batches > 0; batches--) {
        // As equal as they can be: one tile alone takes almost as long as two.
        const int count = static_cast<int>((tiles + batches - 1) / batches);
        const int16_t* batch[kBatch];
        uint8_t* out[kBatch];
        for (int t = 0; t < count; t++, fixed += 2 * kPairs, symbols += kPairs) {
            batch[t] = fixed;
            out[t] = symbols;
        }
        search.encode(batch, out, count);
        tiles -= count;
    }
}

}  // namespace septet
