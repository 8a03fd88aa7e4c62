"""The factorization behind error feedback: Hessian = L D transpose(L), D block diagonal in tiles of four inputs, or of 64 outputs.

L is lower triangular with identity blocks on its diagonal. Row j of L says how much of an error of input j later inputs can
still make up for, "later" meaning smaller numbers: errors of inputs j > k reach input k through L[j, k], so inputs are encoded from
the last tile to the first. The coefficients are rounded to whole multiples of a power of two, so that feedback sums are exact.

Some Hessians are singular (fewer tokens than inputs) or damaged. Damping is added to the diagonal, more if need be; when nothing
helps there is no feedback, and the layer is rounded plainly. Nothing here depends on threads (see `exact`).

Reference: block LDLQ after Tseng et al. 2024 (QuIP#, arXiv 2402.04396); the equal order of Frantar et al. 2023 (GPTQ, 2210.17323).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet.codes.tile import TILE_INPUTS
from septet.errors import ShapeError
from septet.quantize import exact
from septet.quantize.scales import sum_columns

__all__ = ["DAMPINGS", "ERROR_BITS", "Factor", "divide", "factorize"]

#: Parts of the mean diagonal that are added to the diagonal, tried in this order.
DAMPINGS = (0.03, 0.1, 0.3)
#: Errors fed back are whole numbers up to 2^20 (see `feedback`).
ERROR_BITS = 20
MOST_COEFFICIENT_BITS = 30
_PANEL = 128
_DIVISION_PANEL = 256
_STRIP = 1024


@dataclass(frozen=True, eq=False)
class Factor:
    """What error feedback needs to know about the inputs of a layer, or about its outputs.

    Args:
        coefficients: float64 [K, K], strictly lower block triangle of L as whole numbers; None: no feedback.
        shift: L = coefficients * 2^-shift.
        damping: part of the mean diagonal that was added; None: no feedback.
        diagonal: float64 [K], the pivots of the scalar factorization, in units of the Hessian; None: no feedback.
        lower: float64 [K, K], unit lower triangle of the scalar factorization, for `divide`; None: not asked for.
    """

    coefficients: np.ndarray | None
    shift: int = 0
    damping: float | None = None
    diagonal: np.ndarray | None = None
    lower: np.ndarray | None = None


def factorize(
    hessian: np.ndarray | None, dampings: tuple[float, ...] = DAMPINGS, tile: int = TILE_INPUTS, keep_lower: bool = False
) -> Factor:
    """Factorize a Hessian; never fails on its values.

    Args:
        hessian: float64 [K, K], symmetric, in the coded basis; inputs whose row or column is not finite are dropped. None: no feedback.
        dampings: to try one after the other.
        tile: how many neighbours are encoded at once; errors do not reach each other inside a tile.
        keep_lower: keep what `divide` needs.

    Returns:
        A factor without coefficients when no damping makes the Hessian positive definite.

    Raises:
        ShapeError: the Hessian is not square.
    """
    if hessian is None:
        return Factor(None)
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ShapeError("a Hessian must be [in_features, in_features]", list(hessian.shape), "give the Hessian of this layer's inputs")
    usable = drop_damaged(hessian)
    inputs = len(usable)
    with np.errstate(over="ignore"):
        mean = float(sum_columns(np.ascontiguousarray(usable.diagonal())[:, None])[0]) / inputs
    if not 0 < mean < np.inf:
        return Factor(None)
    for damping in dampings:
        lower = usable / mean
        lower[np.diag_indices(inputs)] += damping
        # Schur complements of a positive semidefinite matrix plus damping are at least the damping.
        diagonal = _decompose(lower, damping / 2)
        if diagonal is not None:
            kept = np.tril(lower) if keep_lower else None
            coefficients, shift = _whole_coefficients(lower, tile)
            return Factor(coefficients, shift, damping, diagonal * mean, kept)
    return Factor(None)


def divide(matrix: np.ndarray, factor: Factor) -> np.ndarray:
    """matrix @ inverse(damped Hessian), the same bits on any number of threads.

    Args:
        matrix: float64 [n, K].
        factor: of the Hessian, made with `keep_lower`.

    Returns:
        float64 [n, K].
    """
    lower, size = factor.lower, len(factor.lower)
    result = np.array(matrix, np.float64)
    panels = [(start, min(start + _DIVISION_PANEL, size)) for start in range(0, size, _DIVISION_PANEL)]
    inverses = [_invert_unit_lower(lower[start:stop, start:stop]) for start, stop in panels]
    for (start, stop), inverse in zip(panels, inverses):
        # Solve for y in y @ transpose(L) = matrix, first columns first.
        if start:
            result[:, start:stop] -= exact.product(result[:, :start], np.ascontiguousarray(lower[start:stop, :start].T))
        result[:, start:stop] = exact.product(np.ascontiguousarray(result[:, start:stop]), np.ascontiguousarray(inverse.T))
    result /= factor.diagonal
    for (start, stop), inverse in zip(reversed(panels), reversed(inverses)):
        # And for x in x @ L = y / d, last columns first.
        if stop < size:
            result[:, start:stop] -= exact.product(result[:, stop:], lower[stop:, start:stop])
        result[:, start:stop] = exact.product(np.ascontiguousarray(result[:, start:stop]), inverse)
    return result


def drop_damaged(hessian: np.ndarray) -> np.ndarray:
    """A copy in which inputs with a value that is not finite, or with a negative diagonal, are cut off from all others.

    An input is blamed for a bad value off the diagonal only if its own diagonal is bad, or if the other one's is not.
    """
    diagonal = hessian.diagonal()
    damaged = ~np.isfinite(diagonal) | (diagonal < 0)
    rest = ~np.isfinite(hessian)
    rest[damaged] = False
    rest[:, damaged] = False
    damaged |= rest.any(axis=0) | rest.any(axis=1)
    result = np.array(hessian, np.float64)
    result[damaged] = 0
    result[:, damaged] = 0
    return result


def _decompose(matrix: np.ndarray, floor: float) -> np.ndarray | None:
    """Overwrite the lower triangle of float64 [K, K] with unit lower L of L d transpose(L).

    Returns:
        d, float64 [K]; None when a pivot is below `floor`.
    """
    size = len(matrix)
    pivots = np.empty(size)
    for start in range(0, size, _PANEL):
        stop = min(start + _PANEL, size)
        panel = np.ascontiguousarray(matrix[start:, start:stop])
        for j in range(stop - start):
            pivots[start + j] = panel[j, j]
            if not panel[j, j] >= floor:
                return None
            below = panel[j + 1 :, j] / panel[j, j]
            panel[j + 1 :, j + 1 :] -= below[:, None] * panel[j + 1 : stop - start, j]
            panel[j + 1 :, j] = below
        matrix[start:, start:stop] = panel
        left = np.ascontiguousarray(panel[stop - start :])
        right = np.ascontiguousarray((left * pivots[start:stop]).T)
        for row in range(stop, size, _STRIP):
            end = min(row + _STRIP, size)
            matrix[row:end, stop:end] -= exact.product(left[row - stop : end - stop], right[:, : end - stop])
    return pivots


def _invert_unit_lower(block: np.ndarray) -> np.ndarray:
    """The inverse of a small unit lower triangle, float64 [n, n], its sums in index order."""
    inverse = np.eye(len(block))
    for row in range(1, len(block)):
        inverse[row] -= sum_columns(block[row, :row, None] * inverse[:row])
    return inverse


def _whole_coefficients(lower: np.ndarray, tile: int) -> tuple[np.ndarray, int]:
    """Scalar unit lower L -> strictly lower block triangle with identity blocks on the diagonal, as whole numbers, and their shift.

    Overwrites L.
    """
    size = len(lower)
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        if stop < size:
            inverse = _invert_unit_lower(lower[start:stop, start:stop])
            lower[stop:, start:stop] = exact.product(lower[stop:, start:stop], inverse)
    tiles = np.arange(size) // tile
    for start in range(0, size, _STRIP):
        lower[start : start + _STRIP][tiles[start : start + _STRIP, None] <= tiles] = 0
    largest = float(sum_columns(np.abs(lower)).max(initial=0.0))
    shift = min(MOST_COEFFICIENT_BITS, exact.EXACT_BITS - 2 - ERROR_BITS - int(exact.ceil_log2(np.float64(largest))))
    return np.rint(np.ldexp(lower, shift), out=lower), shift
