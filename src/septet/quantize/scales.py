"""Scales: sums that round the same way everywhere, fp16 rounding, and the scale rule of the trellis code.

Stored scales are fp16, and they are rounded before anything is encoded with them, so that the codes make up for the rounding.
A sum decides bytes on disk, so it must not depend on vector width or threads: it runs in float64 in index order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from septet.codes.trellis import WIDTHS
from septet.errors import CodeRangeError
from septet.quantize.rotation import row_pieces

__all__ = [
    "FLOAT16_MAX",
    "check_finite",
    "column_norms",
    "common_input_scale",
    "headroom",
    "ratio_of_norms",
    "round_to_float16",
    "row_norms",
    "scale_exponent",
    "squared_sums",
    "sum_all",
    "sum_columns",
    "sum_rows",
    "trellis_input_scale",
    "trellis_output_scale",
]

FLOAT16_MAX = 65504.0
#: Largest and smallest power of two that fp16 holds.
_FLOAT16_EXPONENTS = (-24, 15)
_SMALLEST_NORMAL = 2.0**-14
#: Larger scales could leave fp16 when `headroom` enlarges them.
_LARGEST_SCALE = 512.0
#: Squared error of the trellis code against unit variance, roughly; only weighs it against clipping.
_CODE_ERROR = 0.01
#: Below this part of the energy clipping does not matter: a Gaussian loses 0.0004.
CLIPPING_IGNORED = 0.002
#: Columns smaller than this part of the typical one are scaled as if they had it.
_SMALLEST_COLUMN = 1 / 64
#: Outputs that matter less than this part of the mean are taken to matter as much.
_LEAST_IMPORTANCE = 1e-3
_HEADROOMS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 64.0)


def sum_columns(values: np.ndarray) -> np.ndarray:
    """Sum over the first axis in index order.

    Args:
        values: float [n, U], C-contiguous; n may be 0.

    Returns:
        float64 [U].
    """
    if values.shape[1] == 1 and len(values):
        # NumPy adds one contiguous column in pairs, in an order of its own; accumulate cannot.
        return np.add.accumulate(values, axis=0, dtype=np.float64)[-1]
    return np.add.reduce(values, axis=0, dtype=np.float64)


def sum_rows(values: np.ndarray) -> np.ndarray:
    """Sum over the last axis in index order: float [N, n] -> float64 [N]."""
    return sum_columns(np.ascontiguousarray(values.T))


def sum_all(values: np.ndarray) -> float:
    """Sum of the rows' sums, all in index order: float [N, n] or [n] -> a number."""
    sums = values if values.ndim == 1 else sum_rows(values)
    return float(sum_columns(sums.reshape(-1, 1))[0]) if len(sums) else 0.0


def row_norms(weight: np.ndarray, column_scale: np.ndarray | None = None) -> np.ndarray:
    """Root mean square of each row.

    Args:
        weight: float32 [N, K].
        column_scale: float32 [K] to divide by first; None is 1.

    Returns:
        float64 [N]; not finite exactly for rows that hold a NaN or an infinity.
    """
    squares = np.empty(weight.shape[0])
    for start, stop in row_pieces(weight.shape):
        rows = weight[start:stop].astype(np.float64)
        if column_scale is not None:
            rows /= column_scale
        np.multiply(rows, rows, out=rows)
        squares[start:stop] = sum_rows(rows)
    return np.sqrt(squares / max(weight.shape[1], 1))


def check_finite(norms: np.ndarray, name: str) -> None:
    """Raise unless all row norms are finite.

    Raises:
        CodeRangeError: a row holds a NaN or an infinity.
    """
    bad = np.flatnonzero(~np.isfinite(norms))
    if len(bad):
        hint = "repair the source checkpoint, or keep this layer unquantized"
        raise CodeRangeError(f"weights of {name} must be finite", f"a NaN or an infinity in row {bad[0]}", hint)


def round_to_float16(values: np.ndarray, name: str) -> np.ndarray:
    """Round scales or offsets to fp16, to nearest even; tiny ones become 0.

    Args:
        values: float64, any shape.
        name: the tensor, for the message.

    Raises:
        CodeRangeError: a value is larger than fp16 can hold.
    """
    largest = float(np.abs(values).max(initial=0.0))
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(np.float16)
    if not np.isfinite(rounded).all():
        hint = "scale the weights down, or keep this layer unquantized"
        raise CodeRangeError(f"scales and offsets of {name} must be at most {FLOAT16_MAX:.0f}", f"{largest:.4g}", hint)
    return rounded


def column_norms(weight: np.ndarray) -> np.ndarray:
    """Root mean square of each column: float32 [N, K] -> float64 [K], rows added in index order."""
    squares = np.zeros(weight.shape[1])
    for start, stop in row_pieces(weight.shape):
        rows = weight[start:stop].astype(np.float64)
        np.multiply(rows, rows, out=rows)
        squares = sum_columns(np.concatenate([squares[None], rows]))
    return np.sqrt(squares / max(weight.shape[0], 1))


def trellis_input_scale(weights: list[np.ndarray]) -> np.ndarray:
    """The magnitude of s_in for a fused group: the root mean square of each input's column.

    The error of a column is then proportional to its size. Inputs with small weights are mostly those with large activations, so
    this lowers the error of outputs although no activation was seen (docs/log.md). Each tensor of the group counts the same.

    Args:
        weights: float32 [N_i, K], finite.

    Returns:
        float64 [K] with a mean square of about 1, at least 1/64; all 1 when every weight is 0.
    """
    return common_input_scale([column_norms(weight) for weight in weights])


def common_input_scale(norms: Sequence[np.ndarray]) -> np.ndarray:
    """`trellis_input_scale` from the column norms of each tensor, float64 [K]."""
    energies = []
    for norm in norms:
        squares = norm**2
        mean = float(sum_columns(squares[:, None])[0]) / len(squares)
        if mean > 0:
            energies.append(squares / mean)
    if not energies:
        return np.ones(len(norms[0]))
    return np.maximum(np.sqrt(sum_columns(np.array(energies)) / len(energies)), _SMALLEST_COLUMN)


def trellis_output_scale(norms: np.ndarray, output_block: int, importance: np.ndarray | None = None) -> np.ndarray:
    """The magnitude of s_out: halfway between no scaling and making all rows of a rotation block equal.

    Rows are mixed by the output rotation, so they get the same relative precision only as far as they were made equal before
    it; making them quite equal would spend it on rows that matter least. Where errors of the outputs are known to matter in
    different degrees, that degree g makes the sum of g * error least: s_out = sqrt(norm) / g^(1/4). Every block comes out with
    unit mean square.

    Args:
        norms: float64 [N], root mean square of each row.
        output_block: rows that are mixed, divides N.
        importance: float64 [N], g, at least 0; None: all the same.

    Returns:
        float64 [N]; 0 for zero rows.
    """
    blocks = norms.reshape(-1, output_block)
    if importance is None:
        means = sum_rows(blocks) / output_block
        return np.sqrt(blocks * means[:, None]).reshape(-1)
    mean = sum_all(importance) / len(importance)
    if not 0 < mean < np.inf:
        return trellis_output_scale(norms, output_block)
    roots = np.sqrt(np.sqrt(np.maximum(importance / mean, _LEAST_IMPORTANCE))).reshape(-1, output_block)
    # norm^2 / scale^2 = norm * roots^2 before the blocks are brought to unit mean square.
    means = sum_rows(blocks * roots**2) / output_block
    return (np.sqrt(blocks * means[:, None]) / roots).reshape(-1)


def scale_exponent(scales: list[np.ndarray]) -> int:
    """The power of two that moves from s_out to s_in, 0 unless s_out of the fused group leaves the normal range of fp16.

    Args:
        scales: float64 [N_i] of each tensor of the group, as they would be stored with an exponent of 0.

    Returns:
        e, so that s_in = +-2^e and s_out / 2^e is stored; -24..15.
    """
    largest = max(float(scale.max(initial=0.0)) for scale in scales)
    if largest == 0.0 or _SMALLEST_NORMAL <= largest <= _LARGEST_SCALE:
        return 0
    # Into 1/2..1, where both small and large rows of the group have room.
    return int(np.clip(np.frexp(largest)[1], *_FLOAT16_EXPONENTS))


def headroom(rotated: np.ndarray, bits: int, output_block: int) -> np.ndarray:
    """How much to enlarge the scale so that clipping costs less than it saves: 1 for anything like a Gaussian.

    Matrices that cannot be rotated (odd sizes) keep outliers that the table's largest level cannot reach.

    Args:
        rotated: float32 [N, K]; every block of rows has a mean square of about 1.
        bits: bits per pair.
        output_block: rows that share a factor, divides N.

    Returns:
        float64 [N], the best of a few factors from 1 to 64.
    """
    reach = max(WIDTHS[bits].table) / WIDTHS[bits].levels_per_sigma
    lost = _clipped_energy(rotated, reach, output_block)
    factors = np.ones(len(lost))
    cut = np.flatnonzero(lost > CLIPPING_IGNORED)
    if len(cut):
        rows = rotated.reshape(-1, output_block, rotated.shape[1])[cut].reshape(-1, rotated.shape[1])
        least = _CODE_ERROR + lost[cut]
        for factor in _HEADROOMS:
            cost = _CODE_ERROR * factor**2 + _clipped_energy(rows, reach * factor, output_block)
            factors[cut] = np.where(cost < least, factor, factors[cut])
            least = np.minimum(cost, least)
    return np.repeat(factors, output_block)


def _clipped_energy(values: np.ndarray, reach: float, block: int) -> np.ndarray:
    """Mean of (|v| - reach)^2 over the values beyond reach, of each block of rows: float64 [N / block]."""
    sums = np.empty(len(values))
    for start, stop in row_pieces(values.shape):
        beyond = np.maximum(np.abs(values[start:stop]) - np.float32(reach), 0)
        sums[start:stop] = sum_rows(beyond * beyond)
    return sum_rows(sums.reshape(-1, block)) / (block * values.shape[1])


def squared_sums(weight: np.ndarray, decoded: np.ndarray) -> tuple[float, float]:
    """Sum of (weight - decoded)^2 and sum of weight^2 of two float32 [N, K]."""
    difference = energy = 0.0
    for start, stop in row_pieces(weight.shape):
        rows = weight[start:stop].astype(np.float64)
        energy += sum_all(rows * rows)
        rows -= decoded[start:stop]
        difference += sum_all(rows * rows)
    return difference, energy


def ratio_of_norms(difference: float, energy: float) -> float:
    """sqrt(difference / energy) with six digits, so that config.json stays readable; 0 for 0 / 0."""
    if energy == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return float(f"{np.sqrt(difference / energy):.6g}")
