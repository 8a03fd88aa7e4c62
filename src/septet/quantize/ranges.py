"""Ranges of the split code: which scale and offset a field of a channel, group or tensor gets.

A unit is what shares one scale: a column of `values` here, so that sums over it run in index order at full speed. Three methods:
  minmax_shared  one range [lo, hi] for both fields: steps (hi - lo) / 15 and (hi - lo) / 7
  minmax         a range per field
  mse            the range with the least squared error: clip at several multiples of the standard deviation around the mean, keep
                 the best, then alternate between rounding and least squares. Never worse than minmax. An end with an outlier is not
                 clipped: such weights meet the largest activations (docs/log.md). Where it is known how much every input matters,
                 squared errors count that much, and outliers are nothing special.
Symmetric units have no offset; their field minus its zero point (8 or 4) is the level.

Reference: alternating rounding and least squares is Lloyd's algorithm (1982) for equidistant levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from septet.codes.split import FIELD_MAX, ZERO_POINTS
from septet.quantize.scales import round_to_float16, sum_columns

__all__ = ["METHODS", "Range", "fit_fields", "quantize_field", "range_error"]

METHODS = ("minmax_shared", "minmax", "mse")
#: Half widths tried by "mse", in standard deviations. For a Gaussian 2.5 is right for 4 bits and 2.05 for 3 bits.
_CLIPS = (4.0, 3.2, 2.5, 2.05, 1.6, 1.2, 0.8, 0.4)
#: Parts of the whole range tried instead where the importance of every value is known.
_PARTS = tuple(1 - step / 20 for step in range(1, 15))
_REFINEMENTS = 3
#: An end of the range further out than this, in standard deviations, stays where it is. A Gaussian hardly ever has one.
_OUTLIER = 5.0


@dataclass(frozen=True)
class Range:
    """Scale and offset of one field of U units.

    Args:
        field: 0 is the 4-bit, 1 the 3-bit field.
        scale: float16 [U], not negative.
        offset: float16 [U], or None for symmetric units.
    """

    field: int
    scale: np.ndarray
    offset: np.ndarray | None

    def lowest(self) -> np.ndarray:
        """float32 [U], the value of code 0."""
        if self.offset is None:
            return self.scale.astype(np.float32) * np.float32(-ZERO_POINTS[self.field])
        return self.offset.astype(np.float32)

    def where(self, chosen: np.ndarray, other: Range) -> Range:
        """This range where `chosen` (bool [U]), the other one elsewhere."""
        offset = None if self.offset is None else np.where(chosen, self.offset, other.offset)
        return Range(self.field, np.where(chosen, self.scale, other.scale), offset)


def fit_fields(
    parts: tuple[np.ndarray, np.ndarray],
    symmetric: bool,
    method: str,
    name: str,
    importance: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Range, Range]:
    """Choose the ranges of both fields.

    Args:
        parts: float32 [n4, U] and [n3, U], finite, C-contiguous: the weights of the 4-bit and of the 3-bit field; n3 may be 0.
        symmetric: without offsets.
        method: one of `METHODS`.
        name: the tensor, for messages.
        importance: float32 [n4, U or 1] and [n3, U or 1], not negative, how much squared errors count in method "mse"; None: all the same.

    Returns:
        The ranges of the 4-bit and of the 3-bit field.

    Raises:
        CodeRangeError: a weight is too large for fp16 scales and offsets.
    """
    if method == "minmax_shared":
        low, high = _extremes(np.concatenate(parts))
        return _covering(0, low, high, symmetric, name), _covering(1, low, high, symmetric, name)
    if method == "minmax":
        return _fit_minmax(parts[0], 0, symmetric, name), _fit_minmax(parts[1], 1, symmetric, name)
    first, second = importance or (None, None)
    return _fit_mse(parts[0], 0, symmetric, name, first), _fit_mse(parts[1], 1, symmetric, name, second)


def quantize_field(values: np.ndarray, chosen: Range) -> np.ndarray:
    """Round values to codes: float32 [n, U] -> float32 [n, U], whole numbers 0..15 or 0..7; 0 where the scale is 0."""
    codes = values - chosen.lowest()
    # x / inf is 0: a unit without a scale has only code 0, and no division by zero.
    codes /= np.where(chosen.scale == 0, np.float32(np.inf), chosen.scale.astype(np.float32))
    np.rint(codes, out=codes)
    return np.clip(codes, 0, FIELD_MAX[chosen.field], out=codes)


def range_error(values: np.ndarray, codes: np.ndarray, chosen: Range, importance: np.ndarray | None = None) -> np.ndarray:
    """Sum of squared errors of each unit, times `importance` if given, float64 [U]; products and differences are float32."""
    error = codes * chosen.scale.astype(np.float32)
    error += chosen.lowest()
    error -= values
    error *= error
    return sum_columns(error if importance is None else error * importance)


def _extremes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each unit, float64 [U]; 0 and 0 for empty units."""
    if len(values) == 0:
        return np.zeros(values.shape[1]), np.zeros(values.shape[1])
    return values.min(axis=0).astype(np.float64), values.max(axis=0).astype(np.float64)


def _covering(field: int, low: np.ndarray, high: np.ndarray, symmetric: bool, name: str) -> Range:
    """The range whose outermost codes are `low` and `high` (float64 [U]); symmetric ones just include both."""
    if symmetric:
        zero = ZERO_POINTS[field]
        scale = np.maximum(high / (FIELD_MAX[field] - zero), -low / zero)
        return Range(field, round_to_float16(np.maximum(scale, 0), name), None)
    scale = (high - low) / FIELD_MAX[field]
    return Range(field, round_to_float16(scale, name), round_to_float16(low, name))


def _fit_minmax(values: np.ndarray, field: int, symmetric: bool, name: str) -> Range:
    return _covering(field, *_extremes(values), symmetric, name)


def _fit_mse(values: np.ndarray, field: int, symmetric: bool, name: str, importance: np.ndarray | None) -> Range:
    """Try all clips, then refine the best."""
    low, high = _extremes(values)
    best = _covering(field, low, high, symmetric, name)
    count = max(len(values), 1)
    codes = quantize_field(values, best)
    least = range_error(values, codes, best, importance)
    mean = sum_columns(values) / count
    deviation = np.sqrt(np.maximum(sum_columns(np.square(values, dtype=np.float64)) / count - mean * mean, 0))
    for clipped in _clipped(low, high, mean, deviation, importance is not None):
        trial = _covering(field, *clipped, symmetric, name)
        best, codes, least = _better(values, trial, best, codes, least, importance)
    for _ in range(_REFINEMENTS):
        trial = _least_squares(values, codes, best, name, importance)
        best, codes, least = _better(values, trial, best, codes, least, importance)
    return best


def _clipped(
    low: np.ndarray, high: np.ndarray, mean: np.ndarray, deviation: np.ndarray, importance_known: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ranges to try: float64 [U] ends, from the extremes, means and standard deviations of units."""
    if importance_known:
        for part in _PARTS:
            yield mean + part * (low - mean), mean + part * (high - mean)
        return
    low_kept, high_kept = low < mean - _OUTLIER * deviation, high > mean + _OUTLIER * deviation
    for clip in _CLIPS:
        clipped_low = np.where(low_kept, low, np.maximum(low, mean - clip * deviation))
        yield clipped_low, np.where(high_kept, high, np.minimum(high, mean + clip * deviation))


def _better(
    values: np.ndarray, trial: Range, best: Range, codes: np.ndarray, least: np.ndarray, importance: np.ndarray | None
) -> tuple[Range, np.ndarray, np.ndarray]:
    """Per unit the better of two ranges, its codes and its error."""
    trial_codes = quantize_field(values, trial)
    error = range_error(values, trial_codes, trial, importance)
    wins = error < least
    np.copyto(codes, trial_codes, where=wins)
    return trial.where(wins, best), codes, np.where(wins, error, least)


def _least_squares(values: np.ndarray, codes: np.ndarray, current: Range, name: str, importance: np.ndarray | None) -> Range:
    """The scale and offset that fit given codes best; the current ones where the codes do not determine them."""
    if current.offset is None:
        levels = codes - np.float32(ZERO_POINTS[current.field])
        counted = _counted(levels, importance)
        square, product = sum_columns(counted * levels), sum_columns(counted * values)
        scale = np.where((square > 0) & (product > 0), product / np.where(square > 0, square, 1), current.scale)
        return Range(current.field, round_to_float16(scale, name), None)
    count = max(len(values), 1) if importance is None else sum_columns(importance)
    counted = _counted(codes, importance)
    sum_q, sum_v = sum_columns(counted), sum_columns(_counted(values, importance))
    spread = count * sum_columns(counted * codes) - sum_q * sum_q
    slope = count * sum_columns(counted * values) - sum_q * sum_v
    usable = (spread > 0) & (slope > 0)
    scale = np.where(usable, slope / np.where(usable, spread, 1), current.scale)
    offset = np.where(usable, (sum_v - scale * sum_q) / np.where(usable, count, 1), current.offset)
    return Range(current.field, round_to_float16(scale, name), round_to_float16(offset, name))


def _counted(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    """float32 [n, U] values, times their importance where there is one."""
    return values if importance is None else values * importance
