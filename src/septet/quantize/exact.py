"""Float64 matrix products with the same bits on every machine, with any number of threads.

BLAS adds in an order of its own, which depends on threads, sizes and processors; what is quantized with such sums would too.
But sums of whole numbers below 2^53 are exact in float64, in any order, with or without fused multiply-add. So operands are cut
into slices of whole numbers small enough for that, BLAS multiplies the slices, and what remains is done element by element.
Two slices per operand keep 42 bits and more of the largest value of each row and column.

Reference: K. Ozaki, T. Ogita, S. Oishi, S. M. Rump, Error-free transformations of matrix multiplication, 2012.
"""

from __future__ import annotations

import numpy as np

__all__ = ["EXACT_BITS", "ceil_log2", "gram", "product"]

#: Whole numbers up to 2^53 are exact in float64.
EXACT_BITS = 53


def ceil_log2(values: np.ndarray) -> np.ndarray:
    """The smallest e with |value| < 2^e, int; 0 for value 0.

    Args:
        values: float64, any shape, finite.
    """
    return np.frexp(values)[1]


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left @ right, the same bits in whatever order BLAS adds.

    Args:
        left: float64 [n, k], finite, k at least 1.
        right: float64 [k, m], finite.

    Returns:
        float64 [n, m]; the error is about 2^-42 of (largest of the row) x (largest of the column) x k, at most.
    """
    bits = (EXACT_BITS - 1 - int(ceil_log2(np.float64(left.shape[1])))) // 2
    high_left, low_left, left_exponents = _slices(left, bits, axis=1)
    high_right, low_right, right_exponents = _slices(right, bits, axis=0)
    # Both mixed products stay below half of 2^53, so their sum is exact as well.
    mixed = high_left @ low_right
    mixed += low_left @ high_right
    result = high_left @ high_right
    result += np.ldexp(mixed, -bits)
    return np.ldexp(result, left_exponents + right_exponents - 2 * bits)


def gram(rows: np.ndarray) -> np.ndarray:
    """Transpose(rows) @ rows, the same bits in whatever order BLAS adds.

    Each column is rounded to a whole multiple of 2^-b of its largest value, b at least 20: no more than float32 sums lose.

    Args:
        rows: float32 or float64 [n, k], finite, n at least 1, at most 2^12.

    Returns:
        float64 [k, k], symmetric.
    """
    bits = (EXACT_BITS - int(ceil_log2(np.float64(len(rows))))) // 2
    exponents = ceil_log2(np.abs(rows).max(axis=0).astype(np.float64))
    whole = np.rint(np.ldexp(rows.astype(np.float64), bits - exponents))
    return np.ldexp(whole.T @ whole, exponents[:, None] + exponents - 2 * bits)


def _slices(matrix: np.ndarray, bits: int, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """matrix = (high + low * 2^-bits) * 2^(exponent - bits), exponents along `axis`; both slices are whole and at most 2^bits."""
    exponents = ceil_log2(np.abs(matrix).max(axis=axis, keepdims=True))
    scaled = np.ldexp(matrix, bits - exponents)
    high = np.rint(scaled)
    low = np.rint(np.ldexp(scaled - high, bits))
    return high, low, exponents
