"""What happens to activations before and after the product: rotation and rounding to int8.

Every step is one IEEE float32 operation in a stated order, so other backends can equal it bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from septet.errors import ShapeError

__all__ = ["hadamard", "quantize_activations"]

_LARGEST = np.float32(127)


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """Multiply blocks of inputs with the normalized Sylvester Hadamard matrix, which is symmetric and its own inverse.

    Stages h = 1, 2, ..., block/2 turn (a, b), h apart, into (a + b, a - b); then one multiplication by float32(1/sqrt(block)).

    Args:
        x: float32 [M, K].
        block: a power of two that divides K.

    Returns:
        float32 [M, K].

    Raises:
        ShapeError: `block` is no power of two or does not divide K.
    """
    tokens, features = x.shape
    if block < 1 or block & (block - 1) or features % block:
        raise ShapeError(f"a Hadamard block must be a power of two that divides {features}", block, "choose a smaller block")
    values = np.ascontiguousarray(x, np.float32)
    half = 1
    while half < block:
        pairs = values.reshape(tokens, features // (2 * half), 2, half)
        values = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    return values.reshape(tokens, features) * np.float32(1 / math.sqrt(block))


def quantize_activations(x: np.ndarray, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Round activations to int8 with one scale per token and segment.

    absmax = max |x|; scale = absmax / 127; q = rint(x * (127 / absmax)), half to even, clipped to -127..127, and 0 where x is 0.
    Zeros have scale 0. A segment with a NaN or infinity has scale NaN and q 0: its product is NaN, never finite.
    When absmax is below 127 / 2^128 the factor is infinite, so every x but 0 becomes 127 or -127; the error is below absmax.

    Args:
        x: float32 [M, K].
        segment: inputs that share a scale, 1..K or more; the last segment may be shorter.

    Returns:
        int8 [M, K] and float32 [M, ceil(K/segment)].

    Raises:
        ShapeError: `segment` is below 1.
    """
    if segment < 1:
        raise ShapeError("a segment must have at least one input", segment, "use the number of inputs for one scale per token")
    tokens, features = x.shape
    segment = min(segment, max(features, 1))
    count = -(-features // segment)
    padded = np.zeros((tokens, count * segment), np.float32)
    padded[:, :features] = x
    padded = padded.reshape(tokens, count, segment)
    absmax = np.abs(padded).max(axis=2, initial=0)
    finite = np.isfinite(absmax)
    scale = np.where(finite, absmax / _LARGEST, np.float32(np.nan))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = padded * (_LARGEST / absmax)[:, :, None]
    rounded = np.clip(np.rint(scaled), -_LARGEST, _LARGEST)
    quantized = np.where(finite[:, :, None] & (padded != 0), rounded, np.float32(0)).astype(np.int8)
    return np.ascontiguousarray(quantized.reshape(tokens, count * segment)[:, :features]), scale
