"""Output scales fitted again once the codes are known.

In the original basis a decoded row is s q, with q = (row of H_out L H_in) * s_in and s its output scale. Although H_out mixes the rows
of a block, s is applied after it, so the loss (w - s q) H transpose(w - s q) of each output has a scale of its own and the best one is

    s = (w H q) / (q H q)

A system of equations per block would come up only if errors of different outputs were weighed together (a two-sided Hessian).
The fitted scale is rounded to fp16 and taken only where that lowers the loss, so the loss never rises.

Reference: refitting scales in the Hessian metric after Tseng et al. 2024 (QuIP#, arXiv 2402.04396).
"""

from __future__ import annotations

import numpy as np

from septet.quantize import exact, rotation, scales

__all__ = ["better_scales", "refit_output_scale"]


def refit_output_scale(
    targets: np.ndarray, levels: np.ndarray, scale: np.ndarray, hessian: np.ndarray, output_block: int, name: str
) -> np.ndarray:
    """Fit output scales to given levels.

    Args:
        targets: float32 [N, K], H_in (w / s_in) of each row, so outputs are in the original basis and inputs in the coded one.
        levels: int8 [N, K], as decoded.
        scale: float16 [N], the scales so far.
        hessian: float64 [K, K], in the coded basis of the inputs.
        output_block: Hadamard block along the outputs, divides N.
        name: the tensor, for messages.

    Returns:
        float16 [N]: the new scale where it lowers the loss of its row, else the old one. Signs and zeros stay.

    Raises:
        CodeRangeError: a better scale is too large for fp16.
    """
    fitted = scale.copy()
    for start, stop in rotation.row_pieces(targets.shape, output_block):
        rows = rotation.hadamard_outputs(levels[start:stop].astype(np.float32), output_block).astype(np.float64)
        weighted = exact.product(rows, hessian)
        linear = scales.sum_rows(weighted * targets[start:stop])
        square = scales.sum_rows(weighted * rows)
        fitted[start:stop] = better_scales(scale[start:stop], linear, square, name)
    return fitted


def better_scales(scale: np.ndarray, linear: np.ndarray, square: np.ndarray, name: str) -> np.ndarray:
    """The best scale of each row where it lowers the loss, else the old one.

    Args:
        scale: float16 [N], the scales so far.
        linear: float64 [N], w H q of each row.
        square: float64 [N], q H q.
        name: the tensor, for messages.

    Returns:
        float16 [N].
    """
    old = scale.astype(np.float64)
    usable = (square > 0) & (linear * old > 0)
    best = np.where(usable, linear / np.where(usable, square, 1), old)
    rounded = scales.round_to_float16(best, name)
    new = rounded.astype(np.float64)
    better = usable & (new != 0) & (_loss(new, linear, square) < _loss(old, linear, square))
    return np.where(better, rounded, scale)


def _loss(scale: np.ndarray, linear: np.ndarray, square: np.ndarray) -> np.ndarray:
    """Loss of each row less w H w, which no scale changes: float64 [N]."""
    return scale * (scale * square - 2 * linear)
