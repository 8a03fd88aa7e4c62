// One step of the Viterbi search over 2^16 windows, written once for every vector width.
//
// A window of pair p is 16 bits; the next one drops its low `bits` and takes `bits` new ones at the top. With state = window >> bits, the state s after a
// pair is reached by the windows w = s << bits | low, each from the earlier state w & (2^(16 - bits) - 1) = group << bits | low, where group = s mod groups.
// So for one group all 2^bits choices of `low` start from 2^bits neighbouring states, and every s = group + groups * c (c = 0 .. 2^bits - 1) looks at the
// same ones: vectors run over c, each lane keeps the least (cost << 8 | low), and `low` is the survivor that the trace back needs.
// Ties go to the lowest window because `low` is the least significant part of what is compared.
#pragma once
#include <cstdint>

namespace septet {

constexpr int kWindowBits = 16;
constexpr int kBatch = 4;        // at most so many tiles share one pass over the level table
constexpr int kMetricShift = 8;  // a cost carries its survivor in these low bits

// Per-width tables in the order the search reads them: [group][low][c].
// The metric of a window is (2 T0 - X0) T0 + (2 T1 - X1) T1, so the levels are all there is to read.
struct ViterbiTables {
    int bits;
    int32_t* levels;  // two int16: -T0 << 8, -T1 << 8
};

constexpr int states(int bits) { return 1 << (kWindowBits - bits); }
constexpr int groups(int bits) { return 1 << (kWindowBits - 2 * bits); }
// Costs and survivors lie as [group][c]; this is where the state s is found.
constexpr int slot_of_state(int s, int bits) { return ((s & (groups(bits) - 1)) << bits) + (s >> (kWindowBits - 2 * bits)); }

// A step of 1 to kBatch tiles. costs: a row of states(bits) per tile, each cost << 8 | (state mod 2^bits), at slot_of_state; replaced by the next step's.
// inputs: per tile the two fixed-point values of the pair as int16 in one int32. survivors: a row of states(bits) per tile.
struct ViterbiStep {
    const ViterbiTables* tables;
    int32_t* costs;
    int32_t* scratch;
    const int32_t* inputs;
    uint8_t* survivors[kBatch];
};

template <class Vector, int bits, int batch>
void advance(const ViterbiStep& step) {
    constexpr int count = states(bits), branches = 1 << bits;
    constexpr int lanes = Vector::lanes, block = Vector::registers_per_tile * lanes < branches ? Vector::registers_per_tile : branches / lanes;
    typename Vector::Type least[batch];
    for (int t = 0; t < batch; t++) least[t] = Vector::all(INT32_MAX);
    for (int group = 0; group < groups(bits); group++) {
        for (int c = 0; c < branches; c += block * lanes) {
            typename Vector::Type best[batch][block], input[batch];
            for (int t = 0; t < batch; t++) {
                input[t] = Vector::all(step.inputs[t]);
                for (int r = 0; r < block; r++) best[t][r] = Vector::all(INT32_MAX);
            }
            const int32_t* levels = step.tables->levels + ((group << bits) << bits) + c;
            for (int low = 0; low < branches; low++, levels += branches) {
                const int32_t* cost = step.costs + slot_of_state(group << bits | low, bits);
                for (int r = 0; r < block; r++) {
                    const auto level = Vector::load(levels + r * lanes);
                    for (int t = 0; t < batch; t++)
                        best[t][r] = Vector::min(best[t][r], Vector::metric(Vector::all(cost[t * count]), input[t], level));
                }
            }
            for (int t = 0; t < batch; t++)
                for (int r = 0; r < block; r++) {
                    const int slot = (group << bits) + c + r * lanes;
                    Vector::store(step.scratch + t * count + slot, best[t][r]);
                    Vector::store_low_bytes(step.survivors[t] + slot, best[t][r]);
                    least[t] = Vector::min(least[t], best[t][r]);
                }
        }
    }
    // Subtract the least cost (no decision changes, int32 stays in range) and write each state's own low bits into its cost.
    for (int t = 0; t < batch; t++) {
        const auto base = Vector::all(Vector::reduce_min(least[t]) & ~0xFF), mask = Vector::all(~0xFF);
        for (int group = 0; group < groups(bits); group++)
            for (int c = 0; c < branches; c += lanes) {
                const int slot = (group << bits) + c;
                const auto cost = Vector::bit_and(Vector::subtract(Vector::load(step.scratch + t * count + slot), base), mask);
                const auto low = Vector::bit_and(Vector::add(Vector::all(group), Vector::times_groups(c, groups(bits))), Vector::all(branches - 1));
                Vector::store(step.costs + t * count + slot, Vector::bit_or(cost, low));
            }
    }
}

using ViterbiAdvance = void (*)(const ViterbiStep&);
// The three widths 6, 7, 8 in that order, for 1 to kBatch tiles each.
struct ViterbiKernel { ViterbiAdvance advance[3][kBatch]; };

template <class Vector, int bits>
constexpr void fill(ViterbiAdvance (&row)[kBatch]) {
    static_assert(kBatch == 4, "one entry per number of tiles");
    row[0] = advance<Vector, bits, 1>;
    row[1] = advance<Vector, bits, 2>;
    row[2] = advance<Vector, bits, 3>;
    row[3] = advance<Vector, bits, 4>;
}

template <class Vector>
constexpr ViterbiKernel viterbi_kernel() {
    ViterbiKernel kernel{};
    fill<Vector, 6>(kernel.advance[0]);
    fill<Vector, 7>(kernel.advance[1]);
    fill<Vector, 8>(kernel.advance[2]);
    return kernel;
}

extern const ViterbiKernel viterbi_scalar, viterbi_avx2, viterbi_avx512, viterbi_neon;

}  // namespace septet
