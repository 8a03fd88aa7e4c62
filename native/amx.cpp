// AVX-512 VBMI with AMX: products of many tokens on the processor's tiles, everything else as in avx512vbmi.cpp.
//
// Decoded levels lie as the second operand of a tile product wants them, [4 inputs][64 outputs][of 4]: 16 tiles of the format, 64 inputs, are 16 rows of four
// registers. The first operand is up to 16 tokens with 64 inputs each, as they lie in memory. Four registers of sums start at the bias and are exact, so the
// bits are those of every other set. A product of registers takes 16 cycles, as long as 32 of vpdpbusd, and is worth 256 of them; but no vector operation runs
// beside it, so for one token, whose weights are decoded on the way, it would be slower (docs/log.md).
#include <immintrin.h>

#include "steps.h"

namespace septet {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64, kQuarters = 4, kBias = 128;
constexpr int kTilesAtOnce = kTileRows, kInputsAtOnce = kTilesAtOnce * kTileInputs, kDecodedRow = kTileWeights;

// What ldtilecfg reads. Registers 0 to 3 are sums of 16 outputs each, 4 the tokens, 5 to 7 levels.
struct alignas(64) Shapes {
    uint8_t palette = 1, first_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    explicit Shapes(int tokens) {
        for (int i = 0; i < 8; i++) {
            row_bytes[i] = kTileBytes;
            rows[i] = static_cast<uint8_t>(i < 5 ? tokens : kTileRows);
        }
    }
};

// sum[q] += tokens @ levels of outputs 16*q .. 16*q + 15. The intrinsics do not say that they read memory.
inline void add_products(const uint8_t* decoded, int64_t tiles, const int8_t* x, int64_t x_stride) {
    asm volatile("" ::: "memory");
    for (int64_t t = 0; t < tiles; t += kTilesAtOnce, decoded += kTilesAtOnce * kTileWeights, x += kInputsAtOnce) {
        _tile_loadd(4, x, x_stride);
        _tile_loadd(5, decoded, kDecodedRow);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, decoded + kTileBytes, kDecodedRow);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(7, decoded + 2 * kTileBytes, kDecodedRow);
        _tile_dpbsud(2, 4, 7);
        _tile_loadd(5, decoded + 3 * kTileBytes, kDecodedRow);
        _tile_dpbsud(3, 4, 5);
    }
}

// body(first, count) for up to 16 tokens at a time, with registers of that many rows.
template <class Body>
void in_tile_rows(int64_t tokens, const Body& body) {
    for (int64_t first = 0, shaped = 0, count; first < tokens; first += count) {
        count = tokens - first < kTileRows ? tokens - first : kTileRows;
        if (count != shaped) {
            const Shapes shapes(static_cast<int>(shaped = count));
            asm volatile("ldtilecfg %0" ::"m"(shapes));  // GCC 12's intrinsic says that it reads 8 bytes, so that the others would never be written
        }
        body(first, count);
    }
    _tile_release();
}

void decoded_product(const uint8_t* decoded, int64_t tiles, Rows x, int32_t* sums) {
    const int64_t whole = tiles / kTilesAtOnce * kTilesAtOnce;
    in_tile_rows(whole == 0 ? 0 : x.count, [&](int64_t first, int64_t) {
        constexpr int row_bytes = kTileOutputs * sizeof(int32_t);
        int32_t* y = sums + first * kTileOutputs;
        asm volatile("" ::: "memory");
        _tile_loadd(0, y, row_bytes);
        _tile_loadd(1, y + 16, row_bytes);
        _tile_loadd(2, y + 32, row_bytes);
        _tile_loadd(3, y + 48, row_bytes);
        add_products(decoded, whole, x.data + first * x.stride, x.stride);
        _tile_stored(0, y, row_bytes);
        _tile_stored(1, y + 16, row_bytes);
        _tile_stored(2, y + 32, row_bytes);
        _tile_stored(3, y + 48, row_bytes);
    });
    if (whole < tiles)
        kAvx512VbmiKernels.decoded_product(decoded + whole * kTileWeights, tiles - whole, {x.data + whole * kTileInputs, x.stride, x.count}, sums);
}

void add_decoded(const uint8_t* decoded, int64_t tiles, const SegmentedRows& rows, float* y) {
    if (tiles % kTilesAtOnce != 0) return kAvx512VbmiKernels.add_decoded(decoded, tiles, rows, y);
    const Rows& x = rows.x;
    in_tile_rows(x.count, [&](int64_t first, int64_t count) {
        alignas(64) int32_t begin[kTileRows][16], sums[kQuarters][kTileRows][16];
        for (int64_t r = 0; r < count; r++) {
            const int32_t* of_x = rows.sums + (first + r) * 2 * rows.step;
            _mm512_store_si512(begin[r], _mm512_set1_epi32(-kBias * (of_x[0] + of_x[1])));
        }
        asm volatile("" ::: "memory");
        _tile_loadd(0, begin, kTileBytes);
        _tile_loadd(1, begin, kTileBytes);
        _tile_loadd(2, begin, kTileBytes);
        _tile_loadd(3, begin, kTileBytes);
        add_products(decoded, tiles, x.data + first * x.stride, x.stride);
        _tile_stored(0, sums[0], kTileBytes);
        _tile_stored(1, sums[1], kTileBytes);
        _tile_stored(2, sums[2], kTileBytes);
        _tile_stored(3, sums[3], kTileBytes);
        for (int64_t r = 0; r < count; r++) {
            const __m512 scale = _mm512_set1_ps(rows.scales[(first + r) * rows.step]);
            float* at = y + (first + r) * kTileOutputs;
            repeat<kQuarters>([&](auto q) {
                const __m512 scaled = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(_mm512_load_si512(sums[q][r])));
                _mm512_storeu_ps(at + 16 * q, _mm512_add_ps(_mm512_loadu_ps(at + 16 * q), scaled));
            });
        }
    });
}

KernelTable with_tiles() {
    KernelTable kernels = kAvx512VbmiKernels;
    kernels.name = "amx";
    kernels.add_decoded = add_decoded;
    kernels.decoded_product = decoded_product;
    return kernels;
}

}  // namespace

const KernelTable kAmxKernels = with_tiles();

}  // namespace septet
