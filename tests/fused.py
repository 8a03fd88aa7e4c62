"""The reference's products with a scale per block, as Hopper's tensor cores are given them: one fused multiply-add for each block."""

from __future__ import annotations

import numpy as np

from septet.kernels import reference_products

__all__ = ["multiply_add", "segmented_product"]


def multiply_add(scale: np.ndarray, factor: np.ndarray, to: np.ndarray) -> np.ndarray:
    """scale * factor + to, float32, rounded once.

    The product is exact in float64. Where the sum is not, the neighbour with an odd last bit, on the side where the exact sum is, stands
    for it: rounding that to float32 is rounding the exact sum.

    Args:
        scale, factor, to: float32, shapes that broadcast to that of `to`.

    Returns:
        float32, the shape of `to`.
    """
    product = scale.astype(np.float64) * factor
    total = product + to
    part = total - product
    lost = (product - (total - part)) + (to - part)
    even = total.view(np.int64) & 1 == 0
    return np.where((lost != 0) & even, np.nextafter(total, np.copysign(np.inf, lost)), total).astype(np.float32)


def segmented_product(weights: np.ndarray, xq: np.ndarray, xscale: np.ndarray, segment: int) -> np.ndarray:
    """`reference_products.segmented_product` with fused multiply-adds; arguments and result as there."""
    y = np.zeros((len(xq), len(weights)), np.float32)
    for index in range(xscale.shape[1]):
        part = slice(index * segment, (index + 1) * segment)
        sums = reference_products.integer_product(xq[:, part], weights[:, part]).astype(np.float32)
        y = multiply_add(xscale[:, index, None], sums, y)
    return y
