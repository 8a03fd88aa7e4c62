"""Hessians on a GPU: what `quantize.statistics` and `quantize.factorization` do, by the GPU's own float64 routines.

The factors have the same form: coefficients are rounded to whole numbers, so the feedback that uses them is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS
from septet.quantize import GroupStatistics
from septet.quantize.exact import EXACT_BITS
from septet.quantize.factorization import DAMPINGS, ERROR_BITS, MOST_COEFFICIENT_BITS
from septet.quantize.statistics import DRIFT_SHARE, OUTPUT_DAMPINGS
from septet.quantize_gpu.rotation import hadamard

__all__ = ["Factor", "InputMetric", "input_metric", "output_factor"]


@dataclass(frozen=True, eq=False)
class Factor:
    """`quantize.factorization.Factor` for feedback alone: L = coefficients * 2^-shift, float64 [K, K] on a device."""

    coefficients: torch.Tensor
    shift: int


@dataclass(frozen=True, eq=False)
class InputMetric:
    """`quantize.statistics.InputMetric`: all None when nothing is known; matrices are float64 [K, K] on a device."""

    factor: Factor | None = None
    hessian: torch.Tensor | None = None
    correction: torch.Tensor | None = None


def input_metric(statistics: GroupStatistics | None, input_scale: torch.Tensor, block: int) -> InputMetric:
    """Look at a group's inputs in the coded basis.

    Args:
        statistics: arrays, or tensors on the device; None: nothing is known.
        input_scale: float32 [K], s_in, on the device.
        block: Hadamard block that divides K.
    """
    if statistics is None:
        return InputMetric()
    device = input_scale.device
    hessian = _rotated(_without_damage(torch.as_tensor(statistics.inputs).to(device).double()), input_scale, block)
    found = _cholesky(hessian, DAMPINGS)
    if found is None:
        return InputMetric()
    cholesky, mean, damping = found
    correction = None
    if statistics.drift is not None:
        drift = torch.as_tensor(statistics.drift).to(device).double()
        if bool(torch.isfinite(drift).all()):
            correction = torch.cholesky_solve(_rotated(drift, input_scale, block).T, cholesky).T.mul_(DRIFT_SHARE / mean)
            correction.diagonal().add_(1)
        del drift
    factor = _factor(cholesky, TILE_INPUTS)
    hessian.diagonal().add_(damping * mean)
    return InputMetric(factor, hessian, correction)


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
    usable = _without_damage(torch.from_numpy(sensitivity).to(device).double())
    found = _cholesky(_rotated(usable, torch.from_numpy(output_scale).to(device), block), OUTPUT_DAMPINGS)
    return None if found is None else _factor(found[0], TILE_OUTPUTS)


def _without_damage(hessian: torch.Tensor) -> torch.Tensor:
    """`quantize.factorization.drop_damaged`, in place."""
    diagonal = hessian.diagonal()
    damaged = ~torch.isfinite(diagonal) | (diagonal < 0)
    rest = ~torch.isfinite(hessian)
    rest[damaged] = False
    rest[:, damaged] = False
    damaged |= rest.any(0) | rest.any(1)
    hessian[damaged] = 0
    hessian[:, damaged] = 0
    return hessian


def _rotated(matrix: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Hd diag(scale) matrix diag(scale) Hd, float64 [K, K]."""
    wide = scale.double()
    # Row after row, then column after column: the transposes fall into place.
    once = hadamard(matrix * wide, block)
    del matrix
    return hadamard((once * wide[:, None]).T.contiguous(), block).T.contiguous()


def _cholesky(hessian: torch.Tensor, dampings: tuple[float, ...]) -> tuple[torch.Tensor, float, float] | None:
    """The lower triangle C of C transpose(C) = hessian / mean + damping, float64 [K, K]; the mean diagonal; the damping that does."""
    mean = float(hessian.trace()) / len(hessian)
    if not 0 < mean < math.inf:
        return None
    for damping in dampings:
        scaled = hessian / mean
        scaled.diagonal().add_(damping)
        cholesky, failed = torch.linalg.cholesky_ex(scaled)
        del scaled
        # Schur complements of a positive semidefinite matrix plus damping are at least the damping.
        if not int(failed) and float(cholesky.diagonal().square().min()) >= damping / 2:
            return cholesky, mean, damping
    return None


def _factor(cholesky: torch.Tensor, tile: int) -> Factor:
    """The strictly lower block triangle of L with identity blocks on the diagonal, as whole numbers."""
    size = len(cholesky)
    tiles = -(-size // tile)
    lower = torch.zeros((tiles * tile, tiles * tile), dtype=torch.float64, device=cholesky.device)
    lower.diagonal().fill_(1)
    lower[:size, :size] = cholesky / cholesky.diagonal()
    parts = lower.reshape(tiles, tile, tiles, tile)
    inner = parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    unit = torch.eye(tile, dtype=torch.float64, device=cholesky.device).expand_as(inner)
    inverse = torch.linalg.solve_triangular(inner, unit, upper=False, unitriangular=True)
    columns = lower.reshape(-1, tiles, tile).transpose(0, 1) @ inverse
    lower = columns.transpose(0, 1).reshape(tiles, tile, tiles, tile)
    number = torch.arange(tiles, device=cholesky.device)
    lower *= (number[:, None] > number)[:, None, :, None]
    lower = lower.reshape(tiles * tile, -1)[:size, :size]
    largest = float(torch.linalg.vector_norm(lower, 1, dim=0).max())
    shift = min(MOST_COEFFICIENT_BITS, EXACT_BITS - 2 - ERROR_BITS - math.frexp(largest)[1])
    return Factor(lower.mul_(2.0**shift).round_(), shift)
