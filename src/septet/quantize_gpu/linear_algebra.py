"""Hessians on a GPU: what `quantize.statistics` and `quantize.factorization` do, by the GPU's own float64 routines.

A matrix of 28672 inputs takes 6.6 GB, so nothing here makes a second one. One matrix holds the Hessian above the squares on its diagonal
and its factor below them; the squares are kept twice. Work goes in panels of fixed sizes. The factors have the form of the processor's:
coefficients are rounded to whole numbers, so the feedback that uses them is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from septet.codes.tile import TILE_OUTPUTS
from septet.quantize import GroupStatistics
from septet.quantize.exact import EXACT_BITS
from septet.quantize.factorization import DAMPINGS, ERROR_BITS, MOST_COEFFICIENT_BITS
from septet.quantize.statistics import DRIFT_SHARE, OUTPUT_DAMPINGS
from septet.quantize_gpu.rotation import hadamard
from septet.quantize_gpu.sums import slabs

__all__ = ["Decomposition", "Factor", "InputMetric", "decompose", "input_metric", "output_factor"]

#: Rows and columns of a square; a multiple of both sides of a tile.
_PANEL = 1024
#: Rows are rotated, and looked through, in slabs of about so many numbers.
_SLAB = 1 << 25


@dataclass(frozen=True, eq=False)
class Factor:
    """`quantize.factorization.Factor` for feedback alone: L = coefficients * 2^-shift, float64 [K, K] on a device.

    Only what lies below the tiles of the diagonal counts.
    """

    coefficients: torch.Tensor
    shift: int


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A damped Hessian H in units of its mean diagonal, and C with H = C transpose(C), in the place of one matrix.

    Args:
        matrix: float64 [K, K]: C on and below the diagonal, in the squares 0 above it; H above the squares.
        squares: float64, the squares of H on the diagonal, one after the other.
        mean: the unit.
    """

    matrix: torch.Tensor
    squares: list[torch.Tensor]
    mean: float

    def to(self, device: str) -> Decomposition:
        """A copy, usually elsewhere."""
        return Decomposition(self.matrix.to(device, copy=True), [square.to(device, copy=True) for square in self.squares], self.mean)

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ inverse(H), float64 [n, K], in place."""
        panels = _panels(len(self.matrix))
        for panel in panels:
            root = self.matrix[panel, panel]
            if panel.start:
                rows[:, panel].addmm_(rows[:, : panel.start], self.matrix[panel, : panel.start].T, alpha=-1)
            rows[:, panel] = torch.linalg.solve_triangular(root.T, rows[:, panel], upper=True, left=False)
        for panel in reversed(panels):
            root = self.matrix[panel, panel]
            if panel.stop < len(self.matrix):
                rows[:, panel].addmm_(rows[:, panel.stop :], self.matrix[panel.stop :, panel], alpha=-1)
            rows[:, panel] = torch.linalg.solve_triangular(root, rows[:, panel], upper=False, left=False)
        return rows

    def factor(self, tile: int) -> Factor:
        """The strictly lower block triangle of L with identity blocks on the diagonal, as whole numbers; C is used up."""
        matrix, size = self.matrix, len(self.matrix)
        diagonal, inverses = matrix.diagonal().clone(), self._inverse_tiles(tile)
        number = torch.arange(size, device=matrix.device) // tile
        sums = torch.zeros(size, dtype=torch.float64, device=matrix.device)
        for panel in _panels(size):
            left, width = slice(0, panel.stop), -(-panel.stop // tile)
            part = torch.nn.functional.pad(matrix[panel, left] / diagonal[left], (0, width * tile - panel.stop))
            tiles = part.reshape(-1, width, tile).transpose(0, 1) @ inverses[:width]
            part = tiles.transpose(0, 1).reshape(len(part), -1)[:, left] * (number[panel, None] > number[left])
            matrix[panel, left] = part
            sums[left] += part.abs().sum(0)
        shift = min(MOST_COEFFICIENT_BITS, EXACT_BITS - 2 - ERROR_BITS - math.frexp(float(sums.max()))[1])
        for panel in _panels(size):
            matrix[panel, : panel.stop].mul_(2.0**shift).round_()
        return Factor(matrix, shift)

    def hessian(self) -> torch.Tensor:
        """H, float64 [K, K]; a factor is used up."""
        _mirror(self.matrix, self.squares)
        return self.matrix

    def _inverse_tiles(self, tile: int) -> torch.Tensor:
        """The inverses of the unit lower triangles on the diagonal, float64 [tiles, tile, tile]; padding is as the unit matrix."""
        matrix, size = self.matrix, len(self.matrix)
        place = torch.arange(-(-size // tile) * tile, device=matrix.device).reshape(-1, tile)
        there, real = place.clamp(max=size - 1), place < size
        inner = matrix[there[:, :, None], there[:, None]] / matrix.diagonal()[there][:, None]
        unit = torch.eye(tile, dtype=torch.float64, device=matrix.device).expand_as(inner)
        inner = torch.where(real[:, :, None] & real[:, None], inner, unit)
        return torch.linalg.solve_triangular(inner, unit, upper=False, unitriangular=True)


@dataclass(eq=False)
class InputMetric:
    """`quantize.statistics.InputMetric`: all None when nothing is known.

    Args:
        known: the Hessian of the inputs, in the coded basis.
        drift: float32 [K, K], the drift in the coded basis, times the share of it that is made up for.
    """

    known: Decomposition | None = None
    drift: torch.Tensor | None = None

    def to(self, device: str) -> InputMetric:
        """A copy, usually elsewhere."""
        known = None if self.known is None else self.known.to(device)
        return InputMetric(known, None if self.drift is None else self.drift.to(device, copy=True))

    def corrected(self, rows: torch.Tensor) -> torch.Tensor:
        """Rotated weights, float32 [n, K], that make up for moved inputs; before `factor` uses up what it takes."""
        if self.drift is None:
            return rows
        wide = rows.double()
        moved = torch.empty_like(wide)
        for panel in _panels(len(self.drift)):
            moved[:, panel] = wide @ self.drift[:, panel].double()
        return wide.add_(self.known.divide(moved)).float()


def input_metric(statistics: GroupStatistics | None, input_scale: torch.Tensor, block: int) -> InputMetric:
    """Look at a group's inputs in the coded basis.

    Args:
        statistics: arrays, or tensors on the device, which are used up; None: nothing is known.
        input_scale: float32 [K], s_in, on the device.
        block: Hadamard block that divides K.
    """
    if statistics is None:
        return InputMetric()
    hessian = _rotate(_without_damage(_owned(statistics.inputs, torch.float64, input_scale.device)), input_scale, block)
    known = decompose(hessian, DAMPINGS)
    drift = None if known is None or statistics.drift is None else _owned(statistics.drift, torch.float32, input_scale.device)
    if drift is not None:
        finite = all(math.isfinite(float(limit)) for limit in drift.aminmax())
        drift = _rotate(drift, input_scale, block).mul_(DRIFT_SHARE / known.mean) if finite else None
    return InputMetric(known, drift)


def output_factor(sensitivity: np.ndarray, output_scale: np.ndarray, block: int, device: str) -> Factor | None:
    """The factor of one block of outputs, for feedback between its tiles; see `quantize.statistics.output_factor`.

    Args:
        sensitivity: float [B, B], of B neighbouring outputs.
        output_scale: float [B], signed s_out.
        block: Hadamard block that divides B.
        device: where to compute.

    Returns:
        None when all outputs are in one tile, or the sensitivity is of no use.
    """
    if len(sensitivity) <= TILE_OUTPUTS:
        return None
    usable = _without_damage(_owned(sensitivity, torch.float64, device))
    known = decompose(_rotate(usable, torch.from_numpy(output_scale).to(device), block), OUTPUT_DAMPINGS)
    return None if known is None else known.factor(TILE_OUTPUTS)


def decompose(hessian: torch.Tensor, dampings: tuple[float, ...]) -> Decomposition | None:
    """Factorize a Hessian, float64 [K, K], in place; None when no damping makes it positive definite."""
    mean = float(hessian.trace()) / len(hessian)
    if not 0 < mean < math.inf:
        return None
    hessian /= mean
    squares = [hessian[panel, panel].clone() for panel in _panels(len(hessian))]
    for damping in dampings:
        if _cholesky(hessian, damping):
            for square in squares:
                square.diagonal().add_(damping)
            return Decomposition(hessian, squares, mean)
        _mirror(hessian, squares)
    return None


def _cholesky(matrix: torch.Tensor, damping: float) -> bool:
    """Overwrite what lies on and below the squares of the diagonal with C; False when the matrix is not positive definite."""
    size, failed = len(matrix), torch.zeros((), dtype=torch.int32, device=matrix.device)
    matrix.diagonal().add_(damping)
    panels = _panels(size)
    for number, panel in enumerate(panels):
        root, info = torch.linalg.cholesky_ex(matrix[panel, panel])
        failed |= info
        matrix[panel, panel] = root
        if panel.stop == size:
            break
        below = torch.linalg.solve_triangular(root.T, matrix[panel.stop :, panel], upper=True, left=False)
        matrix[panel.stop :, panel] = below
        for other in panels[number + 1 :]:
            rows = below[other.start - panel.stop :]
            matrix[other.start :, other].addmm_(rows, rows[: other.stop - other.start].T, alpha=-1)
    # Schur complements of a positive semidefinite matrix plus damping are at least the damping.
    return not int(failed) and float(matrix.diagonal().square().min()) >= damping / 2


def _mirror(matrix: torch.Tensor, squares: list[torch.Tensor]) -> None:
    """What lies on and below the squares, from what lies above them."""
    for panel, square in zip(_panels(len(matrix)), squares):
        matrix[panel, panel] = square
        matrix[panel.stop :, panel] = matrix[panel, panel.stop :].T


def _panels(size: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, size)) for start in range(0, size, _PANEL)]


def _owned(matrix: Any, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """An array's values in a new tensor, or a tensor itself if it can be."""
    # Not converted on the way: the processor would do that.
    return matrix.to(device, dtype) if isinstance(matrix, torch.Tensor) else torch.from_numpy(matrix).to(device, copy=True).to(dtype)


def _without_damage(hessian: torch.Tensor) -> torch.Tensor:
    """`quantize.factorization.drop_damaged`, in place."""
    diagonal = hessian.diagonal()
    damaged = ~torch.isfinite(diagonal) | (diagonal < 0)
    rows, columns = torch.zeros_like(damaged), torch.zeros_like(damaged)
    for slab in slabs(len(hessian), len(hessian), _SLAB):
        bad = ~torch.isfinite(hessian[slab]) & ~damaged & ~damaged[slab, None]
        rows[slab] = bad.any(1)
        columns |= bad.any(0)
    damaged |= rows | columns
    hessian[damaged] = 0
    hessian[:, damaged] = 0
    return hessian


def _rotate(matrix: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Hd diag(scale) matrix diag(scale) Hd, float64 or float32 [K, K], in place."""
    wide, turn = scale.double(), hadamard(torch.eye(block, dtype=torch.float64, device=scale.device), block)
    for slab in slabs(len(matrix), len(matrix), _SLAB):
        rows = matrix[slab] * wide
        matrix[slab] = (rows.view(-1, block) @ turn).view(rows.shape).to(matrix.dtype)
    for slab in slabs(len(matrix), len(matrix), _SLAB):
        columns = matrix[:, slab] * wide[:, None]
        blocks = turn @ columns.view(-1, block, columns.shape[1])
        matrix[:, slab] = blocks.view(columns.shape).to(matrix.dtype)
    return matrix
