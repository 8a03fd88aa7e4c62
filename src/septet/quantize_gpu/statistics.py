"""What is known of a group's inputs, on a GPU, in the coded basis: what `quantize.statistics` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from septet.quantize import GroupStatistics
from septet.quantize.factorization import DAMPINGS
from septet.quantize.statistics import DRIFT_SHARE
from septet.quantize_gpu.factorization import Decomposition, decompose, panels_of
from septet.quantize_gpu.rotation import hadamard
from septet.quantize_gpu.sums import slabs

__all__ = ["CodedInputs", "InputMetric", "as_coded", "coded_inputs", "moved_by"]

#: Rows are looked through in slabs of about so many numbers.
_SLAB = 1 << 25


@dataclass(eq=False)
class CodedInputs:
    """What a group's statistics say of its inputs, in the coded basis: all None when nothing is known.

    Args:
        hessian: float64 [K, K].
        drift: float32 [K, K], perhaps on another GPU.
    """

    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None

    def metric(self) -> InputMetric:
        """Without the drift; the Hessian is used up."""
        return InputMetric(None if self.hessian is None else decompose(self.hessian, DAMPINGS))


@dataclass(eq=False)
class InputMetric:
    """`quantize.statistics.InputMetric`: all None when nothing is known.

    Args:
        known: the Hessian of the inputs, in the coded basis.
        drift: as in `CodedInputs`.
        correction: float64 [K, K], the drift times the inverse Hessian, instead of the drift.
    """

    known: Decomposition | None = None
    drift: torch.Tensor | None = None
    correction: torch.Tensor | None = None

    def to(self, device: str) -> InputMetric:
        """A copy, usually elsewhere, without the drift."""
        return InputMetric(None if self.known is None else self.known.to(device))

    def combine(self) -> None:
        """Find the correction, which is less work than to multiply and divide more than twice as many rows as there are inputs."""
        if self.drift is not None:
            self.correction, self.drift = self.known.divide(self.drift.double()), None

    def corrected(self, rows: torch.Tensor, parts: Sequence[slice], moved: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """Rotated weights that make up for moved inputs; before `factor` uses up what it takes.

        Args:
            rows: float32 [n, K].
            parts: of the rows, to be multiplied by themselves.
            moved: of each part `moved_by` of it and the drift, or None.

        Returns:
            float32 [n, K].
        """
        if self.drift is None and self.correction is None:
            return rows
        wide = rows.double()
        made = torch.empty_like(wide)
        if self.correction is not None:
            for part in parts:
                torch.mm(wide[part], self.correction, out=made[part])
            return wide.add_(made, alpha=DRIFT_SHARE / self.known.mean).float()
        missing = [part for part, found in zip(parts, moved) if found is None]
        found = iter(moved_by(self.drift, [wide[part] for part in missing]))
        for part, there in zip(parts, moved):
            made[part] = self.known.divide(next(found) if there is None else there)
        return wide.add_(made, alpha=DRIFT_SHARE / self.known.mean).float()

    def forget_moves(self) -> None:
        """Give back the memory of what `corrected` needs."""
        self.drift = self.correction = None


def moved_by(drift: torch.Tensor, several: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """rows @ drift for some rows at a time: float32 [K, K] and float32 or float64 [n, K] each -> float64 [n, K]."""
    wide = [rows.double() for rows in several]
    moved = [torch.empty_like(rows) for rows in wide]
    for panel in panels_of(len(drift)) if several else ():
        columns = drift[:, panel].double()
        for rows, there in zip(wide, moved):
            there[:, panel] = rows @ columns
    return moved


def coded_inputs(statistics: GroupStatistics | None, input_scales: dict[str, torch.Tensor], block: int) -> CodedInputs:
    """Look at a group's inputs in the coded basis.

    Args:
        statistics: arrays, or tensors on devices, which are used up; None: nothing is known.
        input_scales: float32 [K], s_in, by device. The Hessian comes to the first one; the drift, too, if it is on none of them.
        block: Hadamard block that divides K.
    """
    if statistics is None:
        return CodedInputs()
    first = next(iter(input_scales))
    hessian = _owned(statistics.inputs, torch.float64, first)
    # Rarely anything is damaged, and a sum says so of a row.
    whole = (torch.isfinite(hessian.sum(1)) & (hessian.diagonal() >= 0)).all()
    if statistics.drift is None:
        return CodedInputs(_coded(hessian, bool(whole), input_scales[first], block))
    where = str(statistics.drift.device) if isinstance(statistics.drift, torch.Tensor) else first
    where = where if where in input_scales else first
    drift = _owned(statistics.drift, torch.float32, where)
    finite = torch.isfinite(torch.stack(drift.aminmax())).all()
    # Sent to both GPUs, where they are two, before either is waited for.
    drift = _rotate(drift, input_scales[where], block)
    hessian = _coded(hessian, bool(whole), input_scales[first], block)
    return CodedInputs(hessian, drift if finite else None)


def _coded(hessian: torch.Tensor, whole: bool, scale: torch.Tensor, block: int) -> torch.Tensor:
    """In place; a whole one is not looked through for damage."""
    return _rotate(hessian, scale, block) if whole else as_coded(hessian, scale, block)


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
