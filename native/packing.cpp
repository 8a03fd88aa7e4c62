// The C functions about packed weights themselves: symbols <-> bytes, levels, fields, and the encoder.
#include <algorithm>
#include <atomic>
#include <cstring>

#include "products.h"
#include "tables.h"
#include "viterbi.h"

namespace septet {
namespace {

constexpr int kGroup = 8;  // eight symbols of b bits are b bytes
constexpr int kFixedLimit = 1020;
constexpr int64_t kDecodedTiles = 64;

// Decodes a matrix into rows of bytes [64*rows, 4*columns], less `bias`.
void decode_matrix(const KernelTable& kernels, const Matrix& w, int bias, uint8_t* out, int threads) {
    parallel_for(threads, w.rows, [&](int64_t first_row, int64_t last_row) {
        alignas(64) uint8_t decoded[kDecodedTiles * kTileWeights];
        for (int64_t row = first_row; row < last_row; row++)
            for (int64_t t = 0; t < w.columns; t += kDecodedTiles) {
                const int64_t tiles = std::min(kDecodedTiles, w.columns - t);
                kernels.decode[w.decoding](w.tile(row, t), tiles, decoded);
                for (int64_t i = 0; i < tiles * kTileWeights; i++) decoded[i] = static_cast<uint8_t>(decoded[i] - bias);
                for (int o = 0; o < kTileOutputs; o++)
                    for (int64_t i = 0; i < tiles; i++)
                        std::memcpy(out + (row * kTileOutputs + o) * w.inputs() + (t + i) * kTileInputs, decoded + i * kTileWeights + o * kTileInputs, kTileInputs);
            }
    });
}

const WidthTables& search_tables(int bits) {
    static const auto make = [](int width) {
        Array<int8_t> levels = make_array<int8_t>(2 << 16);
        const TrellisTable& table = kTrellisTables[width - 6];
        for (uint32_t w = 0; w < 1 << 16; w++) {
            const uint32_t hash = w * table.multiplier >> 16;
            levels[2 * w] = table.levels[hash & 127];
            levels[2 * w + 1] = table.levels[hash >> 8 & 127];
        }
        return new WidthTables(width, levels.get());  // kept for the life of the process
    };
    if (bits == 6) { static const WidthTables* const tables = make(6); return *tables; }
    if (bits == 7) { static const WidthTables* const tables = make(7); return *tables; }
    static const WidthTables* const tables = make(8);
    return *tables;
}

// Both encoders, after the width is known to be right. make_tables() may throw std::bad_alloc.
template <class MakeTables>
int encode(const MakeTables& make_tables, const int16_t* fixed, int64_t tiles, uint8_t* symbols, int threads) {
    if (!fits(tiles, kTileWeights)) return SEPTET_ERROR_SIZE;
    if (tiles > 0 && (fixed == nullptr || symbols == nullptr)) return SEPTET_ERROR_NULL;
    for (int64_t i = 0; i < tiles * kTileWeights; i++)
        if (fixed[i] < -kFixedLimit || fixed[i] > kFixedLimit) return SEPTET_ERROR_RANGE;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        const auto& width = make_tables();
        std::atomic<bool> failed{false};
        // Threads share whole batches, as equal as they can be and as many for each thread: a tile alone takes almost as long as two.
        const int64_t full = (tiles + kBatch - 1) / kBatch, batches = std::min(tiles, (full + workers - 1) / workers * workers);
        parallel_for(workers, batches, [&](int64_t first_batch, int64_t last_batch) {
            const int64_t first = tiles * first_batch / batches, last = tiles * last_batch / batches;
            try {
                viterbi_encode(width.tables(), *kernels.viterbi, fixed + first * kTileWeights, last - first, symbols + first * kTilePairs);
            } catch (const std::bad_alloc&) {
                failed = true;
            }
        });
        return failed ? SEPTET_ERROR_MEMORY : SEPTET_OK;
    });
}

}  // namespace
}  // namespace septet

using namespace septet;

extern "C" {

int septet_pack(const uint8_t* symbols, int64_t tiles, int bits, uint8_t* packed) {
    if (check_bits(bits) != SEPTET_OK) return SEPTET_ERROR_BITS;
    if (!fits(tiles, kTileWeights)) return SEPTET_ERROR_SIZE;
    if (tiles > 0 && (symbols == nullptr || packed == nullptr)) return SEPTET_ERROR_NULL;
    unsigned seen = 0;
    for (int64_t group = 0; group < tiles * kTilePairs / kGroup; group++, symbols += kGroup, packed += bits) {
        uint64_t word = 0;
        for (int i = 0; i < kGroup; i++) {
            seen |= symbols[i];
            word |= static_cast<uint64_t>(symbols[i]) << bits * i;
        }
        for (int i = 0; i < bits; i++) packed[i] = static_cast<uint8_t>(word >> 8 * i);
    }
    return seen >> bits == 0 ? SEPTET_OK : SEPTET_ERROR_RANGE;
}

int septet_unpack(const uint8_t* packed, int64_t tiles, int bits, uint8_t* symbols) {
    if (check_bits(bits) != SEPTET_OK) return SEPTET_ERROR_BITS;
    if (!fits(tiles, kTileWeights)) return SEPTET_ERROR_SIZE;
    if (tiles > 0 && (symbols == nullptr || packed == nullptr)) return SEPTET_ERROR_NULL;
    for (int64_t group = 0; group < tiles * kTilePairs / kGroup; group++, symbols += kGroup, packed += bits) {
        uint64_t word = 0;
        for (int i = 0; i < bits; i++) word |= static_cast<uint64_t>(packed[i]) << 8 * i;
        for (int i = 0; i < kGroup; i++) symbols[i] = word >> bits * i & ((1u << bits) - 1);
    }
    return SEPTET_OK;
}

int septet_trellis_encode(const int16_t* fixed, int64_t tiles, int bits, uint8_t* symbols, int threads) {
    if (check_bits(bits) != SEPTET_OK) return SEPTET_ERROR_BITS;
    return encode([&]() -> const WidthTables& { return search_tables(bits); }, fixed, tiles, symbols, threads);
}

int septet_trellis_search(const int8_t* levels, const int16_t* fixed, int64_t tiles, int bits, uint8_t* symbols, int threads) {
    if (check_bits(bits) != SEPTET_OK) return SEPTET_ERROR_BITS;
    if (levels == nullptr) return SEPTET_ERROR_NULL;
    for (int i = 0; i < 2 << kWindowBits; i++)
        if (levels[i] == -128) return SEPTET_ERROR_RANGE;
    return encode([&] { return WidthTables(bits, levels); }, fixed, tiles, symbols, threads);
}

int septet_trellis_levels(const septet_tiles* tiles, int8_t* levels, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (levels == nullptr) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        decode_matrix(kernels, Matrix(*tiles, kTrellis6), kernels.level_bias, reinterpret_cast<uint8_t*>(levels), workers);
        return SEPTET_OK;
    });
}

int septet_split_fields(const septet_tiles* tiles, uint8_t* fields, int threads) {
    if (const int error = check_tiles(tiles)) return error;
    if (tiles->bits != 7) return SEPTET_ERROR_BITS;
    if (fields == nullptr) return SEPTET_ERROR_NULL;
    return with_kernels(threads, [&](const KernelTable& kernels, int workers) {
        decode_matrix(kernels, Matrix(*tiles, kSplit7), 0, fields, workers);
        return SEPTET_OK;
    });
}

}  // extern "C"
