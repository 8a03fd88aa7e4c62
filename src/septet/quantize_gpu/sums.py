"""Sums in index order on a GPU, in float64, so that scales have the bits of `quantize.scales`."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from septet.quantize import scales

__all__ = ["clips", "column_norms", "row_norms", "slabs"]

#: Numbers that are widened at a time; a matrix of 28672 x 8192 would take 1.9 GB.
_SLAB = 1 << 26


def row_norms(weight: torch.Tensor, column_scale: np.ndarray | None = None) -> np.ndarray:
    """`quantize.scales.row_norms`: float32 [N, K] on a device, float32 [K] -> float64 [N]."""
    divisor = None if column_scale is None else torch.from_numpy(column_scale).to(weight.device).double()

    def squares(slab: slice) -> np.ndarray:
        rows = weight[slab].double()
        if divisor is not None:
            rows /= divisor
        return _sum_columns(rows.square_().T.contiguous())

    return np.sqrt(np.concatenate([squares(slab) for slab in slabs(*weight.shape)]) / max(weight.shape[1], 1))


def column_norms(weight: torch.Tensor) -> np.ndarray:
    """`quantize.scales.column_norms`: float32 [N, K] on a device -> float64 [K]."""
    squares = [_sum_columns(weight[:, slab].double().square_()) for slab in slabs(weight.shape[1], weight.shape[0])]
    return np.sqrt(np.concatenate(squares) / max(weight.shape[0], 1))


def clips(rotated: torch.Tensor, parts: Iterable[slice], reach: float, output_block: int, ignored: float) -> torch.Tensor:
    """Whether more of a block's energy lies beyond what the levels reach than may be ignored; see `quantize.scales.headroom`.

    Args:
        rotated: float32 [N, K], in standard deviations.
        parts: of the rows, whole blocks each, that are summed up by themselves: other sums could round otherwise.
        reach: of the levels, in standard deviations.
        output_block: rows of a block.
        ignored: how much, in units of the energy that weights have on average.

    Returns:
        bool [N / output_block], where the rows are.
    """
    beyond = (rotated.abs() - reach).clamp_(min=0).square_()
    lost = [beyond[part].sum(1, dtype=torch.float64).reshape(-1, output_block).sum(1) for part in parts]
    return torch.cat(lost) / (output_block * rotated.shape[1]) > ignored


def slabs(count: int, size: int, numbers: int = _SLAB) -> list[slice]:
    """`count` rows or columns of `size` numbers, in slabs of about so many numbers."""
    step = max(1, numbers // max(size, 1))
    return [slice(start, start + step) for start in range(0, max(count, 1), step)]


def _sum_columns(values: torch.Tensor) -> np.ndarray:
    """Sum over the first axis in index order: float64 [n, U], contiguous -> float64 [U]."""
    if values.device.type == "cpu":
        return scales.sum_columns(values.numpy())
    from septet.quantize_gpu.kernels import sum_columns

    return sum_columns(values).cpu().numpy()
