// Another order of the same bytes, for kernels that decode four tiles of the trellis code side by side.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernel_table.h"

namespace septet {

constexpr int kStrands = 8;  // of a tile: each is `bits` 16-bit words of its stream, 16 pairs

// Where in a register of 32 words strand k of tile t lies: a 128-bit lane has strand k of all tiles, then strand k + 4.
inline int strand_lane(int k, int t) { return k % 4 * 8 + k / 4 * kGroupTiles + t; }

// Group after group of four tiles: uint16 [tile][strand][word] -> [word][strand_lane]. `tiles` is a multiple of four; the arrays must not overlap.
inline void arrange_strands(const uint8_t* from, int64_t tiles, int bits, uint8_t* to) {
    constexpr int lanes = kStrands * kGroupTiles, word = sizeof(uint16_t);
    for (int64_t first = 0; first < tiles; first += kGroupTiles, from += kGroupTiles * tile_bytes(bits), to += kGroupTiles * tile_bytes(bits))
        for (int t = 0; t < kGroupTiles; t++)
            for (int k = 0; k < kStrands; k++)
                for (int i = 0; i < bits; i++)
                    std::memcpy(to + word * (i * lanes + strand_lane(k, t)), from + word * ((t * kStrands + k) * bits + i), word);
}

}  // namespace septet
