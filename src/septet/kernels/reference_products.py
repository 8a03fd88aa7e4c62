"""Products of activations with decoded weights: exact in integers, in a stated order in float32.

A float32 matrix product of small integers is exact while every partial sum stays within 2^24, whatever order the BLAS adds in.
So integer products run as float32 products of at most 1024 inputs (1024 * 128 * 128 = 2^24) and are summed as int32.
"""

from __future__ import annotations

import numpy as np

from septet.codes import split
from septet.errors import ShapeError

__all__ = ["float_product", "int8_scaled", "integer_product", "segmented_product", "split_scaled"]

_EXACT_INPUTS = 1024


def _pieces(features: int) -> range:
    return range(0, features, _EXACT_INPUTS)


def _check_inputs(x: np.ndarray, weights: np.ndarray) -> None:
    if x.ndim != 2 or x.shape[1] != weights.shape[1]:
        raise ShapeError(f"activations must be [tokens, {weights.shape[1]}]", list(x.shape), "pad the inputs to whole tiles")


def integer_product(xq: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exact product of small integers.

    Args:
        xq: int8 [M, K].
        weights: int8 or uint8 [N, K], -128..128.

    Returns:
        int32 [M, N].
    """
    _check_inputs(xq, weights)
    total = np.zeros((len(xq), len(weights)), np.int32)
    for start in _pieces(xq.shape[1]):
        piece = slice(start, start + _EXACT_INPUTS)
        total += (xq[:, piece].astype(np.float32) @ weights[:, piece].astype(np.float32).T).astype(np.int32)
    return total


def float_product(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Product in float32, order of additions not defined.

    Args:
        x: float32 [M, K].
        weights: int8 or uint8 [N, K].

    Returns:
        float32 [M, N], within 2*K*2^-24 * sum |x| |w| of the exact product.
    """
    _check_inputs(x, weights)
    total = np.zeros((len(x), len(weights)), np.float32)
    for start in _pieces(x.shape[1]):
        piece = slice(start, start + _EXACT_INPUTS)
        total += x[:, piece] @ weights[:, piece].astype(np.float32).T
    return total


def segmented_product(weights: np.ndarray, xq: np.ndarray, xscale: np.ndarray, segment: int) -> np.ndarray:
    """y = 0; for each segment, ascending: y = y + xscale * float32(integer product of the segment).

    Args:
        weights: int8 [N, K].
        xq: int8 [M, K].
        xscale: float32 [M, ceil(K/segment)].
        segment: inputs per scale.

    Returns:
        float32 [M, N].
    """
    _check_inputs(xq, weights)
    _check_scales(xq, xscale, segment)
    y = np.zeros((len(xq), len(weights)), np.float32)
    for index in range(xscale.shape[1]):
        part = slice(index * segment, (index + 1) * segment)
        y = y + xscale[:, index, None] * integer_product(xq[:, part], weights[:, part]).astype(np.float32)
    return y


def _check_scales(xq: np.ndarray, xscale: np.ndarray, segment: int) -> None:
    wanted = (len(xq), -(-xq.shape[1] // segment))
    if xscale.shape != wanted:
        raise ShapeError(f"activation scales must be {list(wanted)}", list(xscale.shape), "quantize with the same segment")


def split_scaled(
    fields: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, x: np.ndarray, xscale: np.ndarray | None, group: int
) -> np.ndarray:
    """The product of the split code, group by group, ascending.

    Even inputs meet 4-bit fields (E, XE, s4, z4), odd inputs 3-bit fields (O, XO, s3, z3). Per group:
    t = s4*E; t = t + s3*O; with offsets t = t + z4*XE; t = t + z3*XO; y = y + xscale*t. Symmetric fields have 8 and 4 subtracted.

    Args:
        fields: uint8 [N, K].
        scale: float32 [N or 1, 2*G].
        offset: float32 like `scale`, or None for symmetric.
        x: int8 [M, K] with `xscale`, or float32 [M, K] without.
        xscale: float32 [M, G], or None for float activations.
        group: inputs per group.

    Returns:
        float32 [M, N].
    """
    _check_inputs(x, fields)
    groups = -(-x.shape[1] // group)
    if scale.shape[1] != 2 * groups:
        raise ShapeError(f"scales must have {2 * groups} columns", scale.shape[1], "check group_size")
    if xscale is not None:
        _check_scales(x, xscale, group)
    weights = fields
    if offset is None:
        weights = fields.astype(np.int8) - split.zero_points(fields.shape[1]).astype(np.int8)
    product = float_product if xscale is None else integer_product
    y = np.zeros((len(x), len(fields)), np.float32)
    for index in range(groups):
        columns = slice(index * group, (index + 1) * group)
        pair = slice(2 * index, 2 * index + 2)
        parts = x[:, columns], weights[:, columns]
        t = _split_group(product, *parts, scale[:, pair], None if offset is None else offset[:, pair])
        y = y + (t if xscale is None else xscale[:, index, None] * t)
    return y


def _split_group(product, x: np.ndarray, weights: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """One group of `split_scaled`, before the activation scale."""
    even, odd = x[:, 0::2], x[:, 1::2]
    t = scale[:, 0] * product(even, weights[:, 0::2]).astype(np.float32)
    t = t + scale[:, 1] * product(odd, weights[:, 1::2]).astype(np.float32)
    if offset is None:
        return t
    wide = np.float32 if x.dtype == np.float32 else np.int32
    t = t + offset[:, 0] * even.sum(axis=1, dtype=wide).astype(np.float32)[:, None]
    return t + offset[:, 1] * odd.sum(axis=1, dtype=wide).astype(np.float32)[:, None]


def int8_scaled(weight: np.ndarray, scale: np.ndarray, xq: np.ndarray, xscale: np.ndarray) -> np.ndarray:
    """y = scale * (xscale * float32(integer product)).

    Args:
        weight: int8 [N, K].
        scale: float32 [N].
        xq: int8 [M, K].
        xscale: float32 [M, 1].

    Returns:
        float32 [M, N].
    """
    _check_scales(xq, xscale, max(xq.shape[1], 1))
    return scale * (xscale * integer_product(xq, weight).astype(np.float32))
