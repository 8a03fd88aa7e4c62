// Argument checks and the frame of every C function.
#pragma once
#include <memory>
#include <new>

#include "kernel_table.h"
#include "septet.h"
#include "threads.h"

namespace septet {

constexpr int64_t kMaxInputs = 131071;     // K * 128 * 128 stays below 2^31
constexpr int64_t kMaxElements = 1LL << 46;  // of any array: products of checked sizes cannot overflow

template <class T> using Array = std::unique_ptr<T[]>;
// Not initialized.
template <class T> Array<T> make_array(int64_t count) { return Array<T>(new T[static_cast<size_t>(count)]); }

// 0 <= a, 0 <= b and a * b fits an array.
inline bool fits(int64_t a, int64_t b) { return a >= 0 && b >= 0 && (b == 0 || a <= kMaxElements / b); }
inline bool is_block(int64_t block, int64_t features) { return block >= 1 && (block & (block - 1)) == 0 && features % block == 0; }
inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int check_bits(int bits) { return bits < 6 || bits > 8 ? SEPTET_ERROR_BITS : SEPTET_OK; }

inline int check_tiles(const septet_tiles* tiles) {
    if (tiles == nullptr || tiles->packed == nullptr) return SEPTET_ERROR_NULL;
    if (check_bits(tiles->bits) != SEPTET_OK) return SEPTET_ERROR_BITS;
    if (tiles->rows < 1 || tiles->columns < 1 || tiles->columns * kTileInputs > kMaxInputs) return SEPTET_ERROR_SIZE;
    return fits(tiles->rows, tiles->columns * kTileWeights) ? SEPTET_OK : SEPTET_ERROR_SIZE;
}

inline int check_activations(const septet_activations* x, int64_t features) {
    if (x == nullptr) return SEPTET_ERROR_NULL;
    if (!fits(x->tokens, features) || x->segment < 1) return SEPTET_ERROR_SIZE;
    return x->tokens > 0 && (x->values == nullptr || x->scales == nullptr) ? SEPTET_ERROR_NULL : SEPTET_OK;
}

// Resolves instruction set and threads, runs body(kernels, threads), and turns a failed allocation into an error number.
template <class Body>
int with_kernels(int threads, const Body& body) {
    int error;
    const KernelTable* kernels = active_kernels(&error);
    if (kernels == nullptr) return error;
    error = resolve_threads(threads, &threads);
    if (error != SEPTET_OK) return error;
    try {
        return body(*kernels, threads);
    } catch (const std::bad_alloc&) {
        return SEPTET_ERROR_MEMORY;
    }
}

}  // namespace septet
