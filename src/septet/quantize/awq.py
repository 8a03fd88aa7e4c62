"""AWQ, to compare with: inputs with large activations are scaled up before plain rounding, so that they lose less.

Written from the paper. The scale of input k is (root mean square of its activations)^alpha, one alpha per fused group from a grid
search on the squared error of the group's outputs; the paper takes the mean magnitude, which a Hessian does not know. Then ranges are
shrunk group by group where the outputs get better. Scales cost nothing where the layer before can take their inverse (a norm, or
a linear layer with one output per input); elsewhere they are stored, and counted.

Reference: Lin et al. 2024 (AWQ, arXiv 2306.00978), sections 3.2 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from septet.quantize.baselines import Baseline
from septet.quantize.factorization import drop_damaged
from septet.quantize.grids import GridStyle, fit_grid, round_to_grid, search_grid, units_of

__all__ = ["quantize_awq"]

_ALPHAS = tuple(step / 20 for step in range(21))
_SMALLEST_SCALE = 1e-4


def quantize_awq(weights: Sequence[np.ndarray], hessian: np.ndarray | None, style: GridStyle, folded: bool = True) -> list[Baseline]:
    """Round the matrices of a fused group with AWQ.

    Args:
        weights: float32 [N_i, K] each, finite.
        hessian: float64 [K, K], mean of x transpose(x); None: all inputs alike.
        style: bits, symmetry and groups.
        folded: the layer before takes the inverse scales; otherwise 16 bits per input are counted.

    Returns:
        For each the dequantized weight, and its bits with scales and zero points.

    Raises:
        OptionError: the group size does not divide the inputs.
    """
    inputs = weights[0].shape[1]
    usable = np.eye(inputs) if hessian is None else drop_damaged(hessian)
    scale = _search_scale(weights, usable, style)
    scaled_hessian = usable / scale / scale[:, None]
    results = []
    for weight in weights:
        scaled = weight * scale
        grid = search_grid(scaled, style, scaled_hessian)
        rounded = round_to_grid(units_of(scaled, style.width(inputs)), grid).reshape(weight.shape) / scale
        stored = 0.0 if folded else 16 / len(weight)
        results.append(Baseline(rounded.astype(np.float32), style.bits_per_weight(inputs) + stored))
    return results


def _search_scale(weights: Sequence[np.ndarray], hessian: np.ndarray, style: GridStyle) -> np.ndarray:
    """The best scale of every input, float32 [K], among all alphas."""
    magnitude = np.sqrt(hessian.diagonal())
    magnitude = np.maximum(magnitude, _SMALLEST_SCALE * max(magnitude.max(), np.finfo(np.float64).tiny))
    joined = np.concatenate(weights)
    width = style.width(joined.shape[1])
    metric = hessian.astype(np.float32)
    best, least = np.ones(len(magnitude), np.float32), np.inf
    for alpha in _ALPHAS:
        scale = magnitude**alpha
        # Centred between the extremes, as fp16 would want it.
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float16).astype(np.float32)
        scaled = joined * scale
        errors = round_to_grid(units_of(scaled, width), fit_grid(units_of(scaled, width), style)).reshape(joined.shape) / scale - joined
        loss = float(((errors @ metric) * errors).sum(dtype=np.float64))
        if loss < least:
            best, least = scale, loss
    return best
