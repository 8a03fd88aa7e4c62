"""What is known of a group's inputs, on a GPU, in the coded basis: what `quantize.statistics` does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from septet.quantize import GroupStatistics
from septet.quantize.factorization import DAMPINGS
from septet.quantize.statistics import DRIFT_SHARE
from septet.quantize_gpu.factorization import Decomposition, decompose, panels_of
from septet.quantize_gpu.rotation import hadamard
from septet.quantize_gpu.sums import slabs

__all__ = ["InputMetric", "as_coded", "input_metric"]

#: Rows are looked through in slabs of about so many numbers.
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
    hessian = _owned(statistics.inputs, torch.float64, input_scale.device)
    # Rarely anything is damaged, and a sum says so of a row.
    whole = bool((torch.isfinite(hessian.sum(1)) & (hessian.diagonal() >= 0)).all())
    hessian = _rotate(hessian, input_scale, block) if whole else as_coded(hessian, input_scale, block)
    known = decompose(hessian, DAMPINGS)
    drift = None if known is None or statistics.drift is None else _owned(statistics.drift, torch.float32, input_scale.device)
    if drift is not None:
        finite = all(math.isfinite(float(limit)) for limit in drift.aminmax())
        drift = _rotate(drift, input_scale, block).mul_(DRIFT_SHARE / known.mean) if finite else None
    return InputMetric(known, drift)


def as_coded(hessian: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """A Hessian without what is damaged, in the coded basis: float64 [K, K], in place; and signed scales [K]."""
    return _rotate(_without_damage(hessian), scale, block)


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
    wide = scale.double()
    matrix.mul_(wide).mul_(wide[:, None])
    return hadamard(hadamard(matrix, block, out=matrix), block, along_outputs=True, out=matrix)
