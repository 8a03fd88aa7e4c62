"""What is known of a group's inputs and outputs, on a GPU, in the coded basis: what `quantize.statistics` does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from septet.codes.tile import TILE_OUTPUTS
from septet.quantize import GroupStatistics
from septet.quantize.factorization import DAMPINGS
from septet.quantize.statistics import DRIFT_SHARE, OUTPUT_DAMPINGS
from septet.quantize_gpu.factorization import Decomposition, Factor, attempt_factor, decompose, panels_of
from septet.quantize_gpu.rotation import hadamard
from septet.quantize_gpu.sums import slabs

__all__ = ["InputMetric", "input_metric", "output_factors"]

#: Rows are rotated, and looked through, in slabs of about so many numbers.
_SLAB = 1 << 25


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
        for panel in panels_of(len(self.drift)):
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


def output_factors(blocks: Sequence[tuple[np.ndarray | None, np.ndarray]], block: int, device: str) -> list[Factor | None]:
    """The factors of blocks of outputs, for feedback between their tiles; see `quantize.statistics.output_factor`.

    Nothing waits for the GPU before all of them are under way.

    Args:
        blocks: of each the sensitivity, float [B, B], of B neighbouring outputs, or None; and signed s_out, float64 [B].
        block: Hadamard block that divides B.
        device: where to compute.

    Returns:
        None where the sensitivity is not known or of no use, or all outputs are in one tile.
    """
    known = [number for number, (sensitivity, _) in enumerate(blocks) if sensitivity is not None and len(sensitivity) > TILE_OUTPUTS]
    matrices = [_outputs_as_coded(*blocks[number], block, device) for number in known]
    attempts = [attempt_factor(matrix, OUTPUT_DAMPINGS[0], TILE_OUTPUTS) for matrix in matrices]
    made: list[Factor | None] = [None] * len(blocks)
    for number, matrix, (fits, shift) in zip(known, matrices, torch.stack(attempts).tolist() if attempts else []):
        if fits:
            made[number] = Factor(matrix, shift)
        elif (others := decompose(_outputs_as_coded(*blocks[number], block, device), OUTPUT_DAMPINGS[1:])) is not None:
            made[number] = others.factor(TILE_OUTPUTS)
    return made


def _outputs_as_coded(sensitivity: np.ndarray, scale: np.ndarray, block: int, device: str) -> torch.Tensor:
    """A sensitivity in the coded basis of its outputs, float64 [B, B] on the device."""
    there = torch.from_numpy(sensitivity).to(device, copy=True, non_blocking=True).double()
    return _rotate(_without_damage(there), torch.from_numpy(scale).to(device, non_blocking=True), block)


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
    wide, turn = scale.double(), _turn(block, str(scale.device))
    for slab in slabs(len(matrix), len(matrix), _SLAB):
        rows = matrix[slab] * wide
        matrix[slab] = (rows.view(-1, block) @ turn).view(rows.shape).to(matrix.dtype)
    for slab in slabs(len(matrix), len(matrix), _SLAB):
        columns = matrix[:, slab] * wide[:, None]
        blocks = turn @ columns.view(-1, block, columns.shape[1])
        matrix[:, slab] = blocks.view(columns.shape).to(matrix.dtype)
    return matrix


@cache
def _turn(block: int, device: str) -> torch.Tensor:
    """A Hadamard block, float64 [block, block]."""
    return hadamard(torch.eye(block, dtype=torch.float64, device=device), block)
