"""Sums in index order on a GPU, in float64, so that scales have the bits of `quantize.scales`."""

from __future__ import annotations

import numpy as np
import torch

from septet.quantize import scales

__all__ = ["clips", "column_norms", "row_norms"]


def row_norms(weight: torch.Tensor, column_scale: np.ndarray | None = None) -> np.ndarray:
    """`quantize.scales.row_norms`: float32 [N, K] on a device, float32 [K] -> float64 [N]."""
    rows = weight.double()
    if column_scale is not None:
        rows /= torch.from_numpy(column_scale).to(weight.device).double()
    squares = _sum_columns(rows.mul_(rows).T.contiguous())
    return np.sqrt(squares / max(weight.shape[1], 1))


def column_norms(weight: torch.Tensor) -> np.ndarray:
    """`quantize.scales.column_norms`: float32 [N, K] on a device -> float64 [K]."""
    rows = weight.double()
    return np.sqrt(_sum_columns(rows.mul_(rows)) / max(weight.shape[0], 1))


def clips(rotated: torch.Tensor, reach: float, output_block: int, ignored: float) -> bool:
    """Whether in a block of rows more than `ignored` of the mean energy lies beyond what the levels reach."""
    beyond = (rotated.abs() - reach).clamp_(min=0).square_()
    lost = beyond.sum(1, dtype=torch.float64).reshape(-1, output_block).sum(1) / (output_block * rotated.shape[1])
    return bool((lost > ignored).any())


def _sum_columns(values: torch.Tensor) -> np.ndarray:
    """Sum over the first axis in index order: float64 [n, U], contiguous -> float64 [U]."""
    if values.device.type == "cpu":
        return scales.sum_columns(values.numpy())
    from septet.quantize_gpu.kernels import sum_columns

    return sum_columns(values).cpu().numpy()
