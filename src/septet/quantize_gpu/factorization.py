"""Factors of Hessians on a GPU: what `quantize.factorization` does, by the GPU's own float64 routines.

A matrix of 28672 inputs takes 6.6 GB, so nothing here makes a second one. One matrix holds the Hessian above the squares on its diagonal
and its factor below them; the squares are kept twice, and the inverses of the factor's. Work goes in panels of fixed sizes. The factors
have the form of the processor's: coefficients are rounded to whole numbers, so the feedback that uses them is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from septet.quantize.exact import EXACT_BITS
from septet.quantize.factorization import ERROR_BITS, MOST_COEFFICIENT_BITS

__all__ = ["Decomposition", "Factor", "attempt_factor", "decompose", "panels_of"]

#: Rows and columns of a square; a multiple of both sides of a tile.
_PANEL = 1024
#: Of the triangles that are inverted by themselves, all of a panel at once.
_SMALL = 64


@dataclass(frozen=True, eq=False)
class Factor:
    """`quantize.factorization.Factor` for feedback alone: L = coefficients * 2^-shift, float64 [K, K] on a device.

    Only what lies below the tiles of the diagonal counts. The shift may be a tensor [] there.
    """

    coefficients: torch.Tensor
    shift: int | torch.Tensor


@dataclass(frozen=True, eq=False)
class Decomposition:
    """A damped Hessian H in units of its mean diagonal, and C with H = C transpose(C), in the place of one matrix.

    Args:
        matrix: float64 [K, K]: C on and below the diagonal, in the squares 0 above it; H above the squares.
        squares: float64, the squares of H on the diagonal, one after the other.
        inverses: float64, the inverses of the squares of C, one after the other.
        mean: the unit.
    """

    matrix: torch.Tensor
    squares: list[torch.Tensor]
    inverses: list[torch.Tensor]
    mean: float

    def to(self, room: torch.Tensor) -> Decomposition:
        """A copy, usually elsewhere: where `room` is, of the matrix's shape and dtype, which becomes the matrix."""
        squares, inverses = ([square.to(room.device, copy=True) for square in several] for several in (self.squares, self.inverses))
        return Decomposition(room.copy_(self.matrix, non_blocking=True), squares, inverses, self.mean)

    def divide(self, rows: torch.Tensor) -> torch.Tensor:
        """rows @ inverse(H), float64 [n, K], in place."""
        steps = list(zip(panels_of(len(self.matrix)), self.inverses))
        for panel, inverse in steps:
            if panel.start:
                rows[:, panel].addmm_(rows[:, : panel.start], self.matrix[panel, : panel.start].T, alpha=-1)
            rows[:, panel] = rows[:, panel] @ inverse.T
        for panel, inverse in reversed(steps):
            if panel.stop < len(self.matrix):
                rows[:, panel].addmm_(rows[:, panel.stop :], self.matrix[panel.stop :, panel], alpha=-1)
            rows[:, panel] = rows[:, panel] @ inverse
        return rows

    def factor(self, tile: int) -> Factor:
        """The strictly lower block triangle of L with identity blocks on the diagonal, as whole numbers; C is used up."""
        return Factor(self.matrix, _whole_coefficients(self.matrix, tile))

    def hessian(self) -> torch.Tensor:
        """H, float64 [K, K]; a factor is used up."""
        _mirror(self.matrix, self.squares)
        return self.matrix


def decompose(hessian: torch.Tensor, dampings: tuple[float, ...]) -> Decomposition | None:
    """Factorize a Hessian, float64 [K, K], in place; None when no damping makes it positive definite."""
    mean = float(_mean_diagonal(hessian))
    if not 0 < mean < math.inf:
        return None
    hessian /= mean
    panels = panels_of(len(hessian))
    squares = [hessian[panel, panel].clone() for panel in panels]
    for damping in dampings:
        inverses, fits = _cholesky(hessian, damping)
        if fits:
            for square in squares:
                square.diagonal().add_(damping)
            return Decomposition(hessian, squares, [*inverses, _inverse(hessian[panels[-1], panels[-1]])], mean)
        _mirror(hessian, squares)
    return None


def attempt_factor(matrix: torch.Tensor, damping: float, tile: int) -> torch.Tensor:
    """`decompose` with a single damping, then `Decomposition.factor`, in place and without waiting for either.

    Args:
        matrix: float64 [K, K], symmetric.
        damping: in units of its mean diagonal.
        tile: rows and columns of a tile of the factor.

    Returns:
        int64 [2]: whether the matrix was positive definite, and the shift. The matrix is of no use if it was not.
    """
    mean = _mean_diagonal(matrix)
    matrix /= mean
    _, fits = _cholesky(matrix, damping)
    return torch.stack([(fits & (0 < mean) & (mean < math.inf)).long(), _whole_coefficients(matrix, tile)])


def _mean_diagonal(matrix: torch.Tensor) -> torch.Tensor:
    """float64 [], where the matrix is."""
    return matrix.trace() / len(matrix)


def _cholesky(matrix: torch.Tensor, damping: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Overwrite what lies on and below the squares of the diagonal with C.

    Returns:
        The inverses of the squares of C on the diagonal but for the last; and bool [], whether the matrix is positive definite.
    """
    size, failed, inverses = len(matrix), torch.zeros((), dtype=torch.int32, device=matrix.device), []
    matrix.diagonal().add_(damping)
    panels = panels_of(size)
    for number, panel in enumerate(panels):
        root, info = torch.linalg.cholesky_ex(matrix[panel, panel])
        failed |= info
        matrix[panel, panel] = root
        if panel.stop == size:
            break
        # A product is many times as fast as solving for all rows, which is thousands of small kernels.
        inverses.append(_inverse(root))
        below = matrix[panel.stop :, panel] @ inverses[-1].T
        matrix[panel.stop :, panel] = below
        for other in panels[number + 1 :]:
            rows = below[other.start - panel.stop :]
            matrix[other.start :, other].addmm_(rows, rows[: other.stop - other.start].T, alpha=-1)
    # Schur complements of a positive semidefinite matrix plus damping are at least the damping.
    return inverses, (failed == 0) & (matrix.diagonal().square().min() >= damping / 2)


def _inverse(root: torch.Tensor) -> torch.Tensor:
    """The inverse of a lower triangle: of small ones on its diagonal, then of two neighbours together, again and again."""
    size, width = len(root), _SMALL
    if size % width or size & (size - 1):
        return torch.linalg.solve_triangular(root, torch.eye(size, dtype=root.dtype, device=root.device), upper=False)
    small = root.view(size // width, width, size // width, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    unit = torch.eye(width, dtype=root.dtype, device=root.device)
    inverse = torch.linalg.solve_triangular(small.contiguous(), unit, upper=False)
    while width < size:
        pairs = size // (2 * width)
        below = root.view(pairs, 2, width, pairs, 2, width)[:, 1, :, :, 0].diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        first, second = inverse.view(pairs, 2, width, width).unbind(1)
        inverse = torch.zeros((pairs, 2, width, 2, width), dtype=root.dtype, device=root.device)
        inverse[:, 0, :, 0], inverse[:, 1, :, 1], inverse[:, 1, :, 0] = first, second, -second @ (below @ first)
        width *= 2
        inverse = inverse.view(pairs, width, width)
    return inverse[0]


def _whole_coefficients(matrix: torch.Tensor, tile: int) -> torch.Tensor:
    """C to what `Decomposition.factor` says, in place; returns its shift, whole, [], without waiting for it."""
    size = len(matrix)
    diagonal, inverses = matrix.diagonal().clone(), _inverse_tiles(matrix, tile)
    number = torch.arange(size, device=matrix.device) // tile
    sums = torch.zeros(size, dtype=torch.float64, device=matrix.device)
    for panel in panels_of(size):
        left, width = slice(0, panel.stop), -(-panel.stop // tile)
        part = torch.nn.functional.pad(matrix[panel, left] / diagonal[left], (0, width * tile - panel.stop))
        tiles = part.reshape(-1, width, tile).transpose(0, 1) @ inverses[:width]
        part = tiles.transpose(0, 1).reshape(len(part), -1)[:, left] * (number[panel, None] > number[left])
        matrix[panel, left] = part
        sums[left] += part.abs().sum(0)
    room = EXACT_BITS - 2 - ERROR_BITS - torch.frexp(sums.max()).exponent
    shift = room.long().clamp(max=MOST_COEFFICIENT_BITS)
    # 2^shift by its bits: functions for powers need not be exact.
    power = (shift + 1023 << 52).view(torch.float64)
    for panel in panels_of(size):
        matrix[panel, : panel.stop].mul_(power).round_()
    return shift


def _inverse_tiles(matrix: torch.Tensor, tile: int) -> torch.Tensor:
    """The inverses of C's unit lower triangles on the diagonal, float64 [tiles, tile, tile]; padding is as the unit matrix."""
    size = len(matrix)
    place = torch.arange(-(-size // tile) * tile, device=matrix.device).reshape(-1, tile)
    there, real = place.clamp(max=size - 1), place < size
    inner = matrix[there[:, :, None], there[:, None]] / matrix.diagonal()[there][:, None]
    unit = torch.eye(tile, dtype=torch.float64, device=matrix.device).expand_as(inner)
    inner = torch.where(real[:, :, None] & real[:, None], inner, unit)
    return torch.linalg.solve_triangular(inner, unit, upper=False, unitriangular=True)


def _mirror(matrix: torch.Tensor, squares: list[torch.Tensor]) -> None:
    """What lies on and below the squares, from what lies above them."""
    for panel, square in zip(panels_of(len(matrix)), squares):
        matrix[panel, panel] = square
        matrix[panel.stop :, panel] = matrix[panel, panel.stop :].T


def panels_of(size: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, size)) for start in range(0, size, _PANEL)]
