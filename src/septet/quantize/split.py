"""Quantizing with the memoryless code: cut a matrix into units that share a scale, quantize each, put codes and scales together again.

A unit is a row (channel), a run of `group_size` inputs of a row (group) or everything (tensor). Pieces of units are independent, so
they run on threads; their size follows the cache, never the number of threads. Padding to whole tiles is symbol 0.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from septet.codes import split as split_code
from septet.codes.tile import tiles_of_matrix
from septet.errors import OptionError, ShapeError
from septet.kernels import select_backend
from septet.quantize import ranges, scales
from septet.quantize.split_feedback import encode_fields, plan_feedback
from septet.quantize.tensor import QuantizedTensor, common_inputs, dequantize
from septet.quantize.threads import default_threads

__all__ = ["GRANULARITIES", "quantize_split", "quantize_split_with_feedback"]

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
    units = _Units(symmetric, granularity, group_size if granularity == "group" else None, range_method, name)
    _check(weight, units)
    return _stored(weight, *_quantize_units(weight, units, threads), units)


def quantize_split_with_feedback(
    weight: np.ndarray,
    hessian: np.ndarray | None,
    symmetric: bool = False,
    granularity: str = "channel",
    group_size: int = 128,
    threads: int = 0,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize with the memoryless code, knowing the layer's inputs: ranges by what matters, then rounding with error feedback.

    Args:
        weight, symmetric, granularity, group_size, threads, name: as in `quantize_split`; the range method is "mse".
        hessian: float64 [K, K], mean of x transpose(x) over the inputs of the layer; values that are not finite are left out. None, or
            one that says nothing (a multiple of the identity): the same bytes as `quantize_split`.

    Raises:
        CodeRangeError, OptionError, ShapeError: as in `quantize_split`; ShapeError also when the Hessian is of another size.
    """
    units = _Units(symmetric, granularity, group_size if granularity == "group" else None, "mse", name)
    _check(weight, units)
    inputs = weight.shape[1]
    if hessian is not None and hessian.shape != (inputs, inputs):
        hint = "take the Hessian of this layer's own inputs"
        raise ShapeError(f"the Hessian of {name} must be [{inputs}, {inputs}]", list(hessian.shape), hint)
    plan = plan_feedback(hessian)
    if plan is None:
        return _stored(weight, *_quantize_units(weight, units, threads), units)
    _, scale, offset = _quantize_units(weight, replace(units, importance=plan.importance), threads)
    slot = 2 * (np.arange(inputs) // (units.group or inputs)) + np.arange(inputs) % 2
    steps, lowest = (None if part is None else part.astype(np.float32)[:, slot] for part in (scale, offset))
    return _stored(weight, encode_fields(weight, steps, lowest, plan, threads), scale, offset, units)


@dataclass(frozen=True, eq=False)
class _Units:
    """What shares a scale, and how it is chosen.

    Args:
        symmetric: without offsets.
        granularity: "channel", "group" or "tensor".
        group: inputs per group, with granularity "group".
        method: one of `ranges.METHODS`.
        name: for messages.
        importance: float32 [K], how much squared errors of the inputs count; None: all the same.
    """

    symmetric: bool
    granularity: str
    group: int | None
    method: str
    name: str
    importance: np.ndarray | None = None


def _check(weight: np.ndarray, units: _Units) -> None:
    """Refuse what cannot be quantized."""
    common_inputs([weight])
    if units.granularity not in GRANULARITIES:
        raise OptionError(f"granularity must be one of {', '.join(GRANULARITIES)}", units.granularity, "use channel")
    if units.method not in ranges.METHODS:
        raise OptionError(f"the range method must be one of {', '.join(ranges.METHODS)}", units.method, "use mse")
    if units.group is not None and (units.group < 4 or units.group % 4):
        raise OptionError("group_size must be a multiple of 4", units.group, "use 128")
    scales.check_finite(scales.row_norms(weight), units.name)


def _stored(weight: np.ndarray, fields: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, units: _Units) -> QuantizedTensor:
    """Pack fields (uint8 [N, K]), and measure what they lost."""
    symbols = split_code.symbols_of_fields(tiles_of_matrix(fields))
    packed = select_backend().pack(np.ascontiguousarray(symbols), split_code.BITS_PER_PAIR)
    stored = QuantizedTensor("split", split_code.BITS_PER_PAIR, weight.shape, packed, scale, offset, group_size=units.group)
    return replace(stored, relative_error=scales.ratio_of_norms(*scales.squared_sums(weight, dequantize(stored))))


def _quantize_units(weight: np.ndarray, units: _Units, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Choose scales and round plainly.

    Args:
        weight: float32 [N, K], finite.
        units: what shares a scale.
        threads: 0 is the default number.

    Returns:
        Codes uint8 [N, K]; scales float16 [N or 1, 2*G]; offsets like the scales, or None.
    """
    outputs, inputs = weight.shape
    codes = np.empty(weight.shape, np.uint8)
    if units.granularity == "tensor":
        parts = weight[:, 0::2].reshape(-1, 1), weight[:, 1::2].reshape(-1, 1)
        coded, scale, offset = _quantize_parts(parts, units, _importance_of_parts(units, slice(0, inputs), inputs, outputs, True))
        for field, part in enumerate(coded):
            codes[:, field::2] = part.reshape(outputs, -1)
        return codes, scale, offset
    width = units.group or inputs
    scale = np.empty((outputs, 2 * -(-inputs // width)), np.float16)
    offset = None if units.symmetric else np.empty_like(scale)
    rows_at_once = max(1, _PIECE_WEIGHTS // inputs)

    def work(start: int) -> None:
        rows = slice(start, min(start + rows_at_once, outputs))
        for columns, slots in _sections(inputs, width):
            unit_width = min(width, columns.stop - columns.start)
            values = weight[rows, columns].reshape(-1, unit_width)
            parts = np.ascontiguousarray(values[:, 0::2].T), np.ascontiguousarray(values[:, 1::2].T)
            importance = _importance_of_parts(units, columns, unit_width, rows.stop - rows.start)
            coded, unit_scale, unit_offset = _quantize_parts(parts, units, importance)
            joined = np.empty(values.shape, np.uint8)
            joined[:, 0::2], joined[:, 1::2] = coded[0].T, coded[1].T
            codes[rows, columns] = joined.reshape(rows.stop - rows.start, -1)
            scale[rows, slots] = unit_scale.reshape(rows.stop - rows.start, -1)
            if offset is not None:
                offset[rows, slots] = unit_offset.reshape(rows.stop - rows.start, -1)

    with ThreadPoolExecutor(threads or default_threads()) as pool:
        list(pool.map(work, range(0, outputs, rows_at_once)))
    return codes, scale, offset


def _importance_of_parts(
    units: _Units, columns: slice, width: int, rows: int, one_unit: bool = False
) -> tuple[np.ndarray, np.ndarray] | None:
    """The importance of every weight of some rows, arranged as the parts are: float32 [n4, U] and [n3, U]."""
    if units.importance is None:
        return None
    values = np.tile(units.importance[columns].reshape(-1, width), (rows, 1))
    if one_unit:
        return values[:, 0::2].reshape(-1, 1), values[:, 1::2].reshape(-1, 1)
    return np.ascontiguousarray(values[:, 0::2].T), np.ascontiguousarray(values[:, 1::2].T)


def _sections(inputs: int, width: int) -> list[tuple[slice, slice]]:
    """Columns and scale slots of all whole groups, then of the shorter last one, as far as there are any."""
    whole = inputs // width
    sections = [(slice(0, whole * width), slice(0, 2 * whole))] if whole else []
    if inputs % width:
        sections.append((slice(whole * width, inputs), slice(2 * whole, 2 * whole + 2)))
    return sections


def _quantize_parts(
    parts: tuple[np.ndarray, np.ndarray], units: _Units, importance: tuple[np.ndarray, np.ndarray] | None
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray | None]:
    """Codes (whole float32 numbers) of both parts [n4, U] and [n3, U], and their scales and offsets, float16 [U, 2]."""
    fitted = ranges.fit_fields(parts, units.symmetric, units.method, units.name, importance)
    codes = [ranges.quantize_field(part, chosen) for part, chosen in zip(parts, fitted)]
    scale = np.stack([chosen.scale for chosen in fitted], axis=1)
    offset = None if units.symmetric else np.stack([chosen.offset for chosen in fitted], axis=1)
    return codes, scale, offset
