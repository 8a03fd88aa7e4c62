// The loops of avx512_strands.h for cores that read differently, beside each other: a machine's library runs only its own. Status 1 when outputs differ.
#include <cstdio>
#include <random>
#include <vector>

#include "avx512_strands.h"

using namespace septet;

namespace {

// Every count of rows up to two turns of the most streams, and what is left over.
template <int bits>
bool agree(int64_t tiles, int64_t segment_tiles) {
    constexpr int64_t most = 2 * kStreams + 1;
    std::mt19937 random(static_cast<unsigned>(bits));
    std::vector<uint8_t> packed(static_cast<size_t>(most * tiles * tile_bytes(bits)));
    std::vector<int8_t> x(static_cast<size_t>(tiles * kTileInputs));
    for (uint8_t& byte : packed) byte = static_cast<uint8_t>(random());
    for (int8_t& value : x) value = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
    std::vector<int32_t> sums(static_cast<size_t>(2 * tiles));
    std::vector<float> scales(static_cast<size_t>(tiles));
    for (int32_t& sum : sums) sum = static_cast<int32_t>(random() % 1000);
    for (float& scale : scales) scale = 0.01f * static_cast<float>(1 + random() % 100);
    const SegmentedRow row{x.data(), segment_tiles, sums.data(), scales.data()};
    for (int64_t count = 1; count <= most; count++) {
        std::vector<float> intel(static_cast<size_t>(count * kTileOutputs)), zen(intel.size());
        product_in_streams<Intel, bits>({packed.data(), count, tiles}, row, intel.data());
        product_in_streams<Zen5, bits>({packed.data(), count, tiles}, row, zen.data());
        if (intel != zen) {
            std::fprintf(stderr, "%d bits, %d rows of %d tiles in segments of %d: outputs differ\n", bits, static_cast<int>(count), static_cast<int>(tiles),
                         static_cast<int>(segment_tiles));
            return false;
        }
    }
    return true;
}

}  // namespace

int main() {
    bool fine = true;
    for (const int64_t tiles : {4, 20, 64})
        for (const int64_t segment : {4, 12, 64}) fine &= agree<6>(tiles, segment) && agree<7>(tiles, segment) && agree<8>(tiles, segment);
    return fine ? 0 : 1;
}
