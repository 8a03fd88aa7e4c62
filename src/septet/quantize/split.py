"""Quantizing with the memoryless code: cut a matrix into units that share a scale, quantize each, put codes and scales together again.

A unit is a row (channel), a run of `group_size` inputs of a row (group) or everything (tensor). Pieces of units are independent, so
they run on threads; their size follows the cache, never the number of threads. Padding to whole tiles is symbol 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from septet.codes import split as split_code
from septet.codes.tile import tiles_of_matrix
from septet.errors import OptionError
from septet.kernels import select_backend
from septet.quantize import ranges, scales
from septet.quantize.tensor import QuantizedTensor, common_inputs, dequantize
from septet.quantize.threads import default_threads

__all__ = ["GRANULARITIES", "quantize_split"]

GRANULARITIES = ("channel", "group", "tensor")
#: Weights of one piece: its few float32 temporaries stay in a level 2 cache.
_PIECE_WEIGHTS = 1 << 17


def quantize_split(
    weight: np.ndarray,
    symmetric: bool = False,
    granularity: str = "channel",
    group_size: int = 128,
    range_method: str = "mse",
    threads: int = 0,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize with the memoryless code.

    Args:
        weight: float32 [N, K], finite.
        symmetric: store no offsets.
        granularity: "channel" (a row), "group" (`group_size` inputs of a row) or "tensor": what shares a scale.
        group_size: a multiple of 4, used with granularity "group".
        range_method: "mse", "minmax" or "minmax_shared"; see `ranges`.
        threads: 0 is the default number; the result does not depend on it.
        name: module name, for messages.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown granularity, method or group size.
        ShapeError: the weight is not float32 [N, K].
    """
    common_inputs([weight])
    if granularity not in GRANULARITIES:
        raise OptionError(f"granularity must be one of {', '.join(GRANULARITIES)}", granularity, "use channel")
    if range_method not in ranges.METHODS:
        raise OptionError(f"the range method must be one of {', '.join(ranges.METHODS)}", range_method, "use mse")
    if granularity == "group" and (group_size < 4 or group_size % 4):
        raise OptionError("group_size must be a multiple of 4", group_size, "use 128")
    scales.check_finite(scales.row_norms(weight), name)
    group = {"channel": None, "group": group_size, "tensor": None}[granularity]
    fields, scale, offset = _quantize_units(weight, name, symmetric, granularity, group, range_method, threads)
    tiles = tiles_of_matrix(fields)
    symbols = split_code.symbols_of_fields(tiles)
    packed = select_backend().pack(np.ascontiguousarray(symbols), split_code.BITS_PER_PAIR)
    stored = QuantizedTensor("split", split_code.BITS_PER_PAIR, weight.shape, packed, scale, offset, group_size=group)
    return replace(stored, relative_error=scales.ratio_of_norms(*scales.squared_sums(weight, dequantize(stored))))


def _quantize_units(
    weight: np.ndarray, name: str, symmetric: bool, granularity: str, group: int | None, method: str, threads: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Quantize a matrix with the split code.

    Args:
        weight: float32 [N, K], finite.
        name: for messages.
        symmetric: without offsets.
        granularity: "channel", "group" or "tensor".
        group: inputs per group, with granularity "group".
        method: one of `ranges.METHODS`.
        threads: 0 is the default number.

    Returns:
        Codes uint8 [N, K]; scales float16 [N or 1, 2*G]; offsets like the scales, or None.
    """
    outputs, inputs = weight.shape
    codes = np.empty(weight.shape, np.uint8)
    if granularity == "tensor":
        parts = weight[:, 0::2].reshape(-1, 1), weight[:, 1::2].reshape(-1, 1)
        coded, scale, offset = _quantize_parts(parts, symmetric, method, name)
        for field, part in enumerate(coded):
            codes[:, field::2] = part.reshape(outputs, -1)
        return codes, scale, offset
    width = group or inputs
    scale = np.empty((outputs, 2 * -(-inputs // width)), np.float16)
    offset = None if symmetric else np.empty_like(scale)
    rows_at_once = max(1, _PIECE_WEIGHTS // inputs)

    def work(start: int) -> None:
        rows = slice(start, min(start + rows_at_once, outputs))
        for columns, slots in _sections(inputs, width):
            units = weight[rows, columns].reshape(-1, min(width, columns.stop - columns.start))
            parts = np.ascontiguousarray(units[:, 0::2].T), np.ascontiguousarray(units[:, 1::2].T)
            coded, unit_scale, unit_offset = _quantize_parts(parts, symmetric, method, name)
            joined = np.empty(units.shape, np.uint8)
            joined[:, 0::2], joined[:, 1::2] = coded[0].T, coded[1].T
            codes[rows, columns] = joined.reshape(rows.stop - rows.start, -1)
            scale[rows, slots] = unit_scale.reshape(rows.stop - rows.start, -1)
            if offset is not None:
                offset[rows, slots] = unit_offset.reshape(rows.stop - rows.start, -1)

    with ThreadPoolExecutor(threads or default_threads()) as pool:
        list(pool.map(work, range(0, outputs, rows_at_once)))
    return codes, scale, offset


def _sections(inputs: int, width: int) -> list[tuple[slice, slice]]:
    """Columns and scale slots of all whole groups, then of the shorter last one, as far as there are any."""
    whole = inputs // width
    sections = [(slice(0, whole * width), slice(0, 2 * whole))] if whole else []
    if inputs % width:
        sections.append((slice(whole * width, inputs), slice(2 * whole, 2 * whole + 2)))
    return sections


def _quantize_parts(
    parts: tuple[np.ndarray, np.ndarray], symmetric: bool, method: str, name: str
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Codes (whole float32 numbers) of both parts [n4, U] and [n3, U], and their scales and offsets, float16 [U, 2]."""
    fitted = ranges.fit_fields(parts, symmetric, method, name)
    codes = [ranges.quantize_field(part, chosen) for part, chosen in zip(parts, fitted)]
    scale = np.stack([chosen.scale for chosen in fitted], axis=1)
    offset = None if symmetric else np.stack([chosen.offset for chosen in fitted], axis=1)
    return codes, scale, offset
