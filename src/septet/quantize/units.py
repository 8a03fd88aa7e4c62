"""Cut a matrix into units that share a scale, quantize them piece by piece, put codes and scales together again.

A unit is a row (channel), a run of `group` inputs of a row (group) or everything (tensor). Pieces of units are independent, so
they run on threads; their size follows the cache, never the number of threads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from septet.quantize.ranges import fit_fields, quantize_field

__all__ = ["GRANULARITIES", "default_threads", "quantize_units"]

GRANULARITIES = ("channel", "group", "tensor")
#: Weights of one piece: its few float32 temporaries stay in a level 2 cache.
_PIECE_WEIGHTS = 1 << 17


def default_threads() -> int:
    """SEPTET_THREADS, else OMP_NUM_THREADS, else the number of CPUs."""
    for variable in ("SEPTET_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
    return os.cpu_count() or 1


def quantize_units(
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
    fitted = fit_fields(parts, symmetric, method, name)
    codes = [quantize_field(part, chosen) for part, chosen in zip(parts, fitted)]
    scale = np.stack([chosen.scale for chosen in fitted], axis=1)
    offset = None if symmetric else np.stack([chosen.offset for chosen in fitted], axis=1)
    return codes, scale, offset
