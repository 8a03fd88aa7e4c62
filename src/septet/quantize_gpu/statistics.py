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
    """What a group's statistics say of its inputs: no tensors when nothing is known.

    Args:
        input_scale: float32 [K], s_in, where the Hessian is.
        block: Hadamard block that divides K.
        hessian: float64 [K, K], not yet in the coded basis.
        drift: float32 [K, K], in the coded basis, perhaps on another GPU.
    """

    input_scale: torch.Tensor
    block: int
    hessian: torch.Tensor | None = None
    drift: torch.Tensor | None = None

    def metric(self) -> InputMetric:
        """Without the drift; the Hessian is used up."""
        if self.hessian is None:
            return InputMetric()
        # Rarely anything is damaged, and a sum says so of a row.
        whole = (torch.isfinite(self.hessian.sum(1)) & (self.hessian.diagonal() >= 0)).all()
        coded = (_rotate if whole else as_coded)(self.hessian, self.input_scale, self.block)
        return InputMetric(decompose(coded, DAMPINGS))


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

    def to(self, room: torch.Tensor | None) -> InputMetric:
        """A copy, usually elsewhere, without the drift; `room` as in `Decomposition.to`, if there is anything to copy."""
        return InputMetric(None if self.known is None else self.known.to(room))

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
    """Look at a group's inputs. Only the GPU that has the drift is waited for.

    Args:
        statistics: arrays, or tensors on devices, which are used up; None: nothing is known.
        input_scales: float32 [K], s_in, by device. The Hessian comes to the first one; the drift, too, if it is on none of them.
        block: Hadamard block that divides K.
    """
    first, scale = next(iter(input_scales.items()))
    coded = CodedInputs(scale, block)
    if statistics is None:
        return coded
    coded.hessian = _owned(statistics.inputs, torch.float64, first)
    if statistics.drift is not None:
        where = str(statistics.drift.device) if isinstance(statistics.drift, torch.Tensor) else first
        where = where if where in input_scales else first
        drift = _owned(statistics.drift, torch.float32, where)
        finite = torch.isfinite(torch.stack(drift.aminmax())).all()
        drift = _rotate(drift, input_scales[where], block)
        coded.drift = drift if finite else None
    return coded


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
