"""Bit allocation: 6, 7 or 8 bits per pair for each group of layers, at an exact average.

The expected loss of a group is the distortion of the code at its width times what one unit of it costs the model's predictions. With error
feedback that is (sum of the pivots of the inputs' Hessian in the coded basis) x (sum over outputs of s_out^2 times how much they matter).

Losses add up, so the best widths for some average are those that minimize loss + price * bits, each group on its own; the price is
found by bisection, and what it leaves over goes to the groups that gain most from it.

Reference: linearity of the loss after Malinovskii et al. 2024 (HIGGS, arXiv 2411.17525).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from septet.codes.tile import BITS_PER_PAIR
from septet.quantize import rotation, scales
from septet.quantize.statistics import GroupStatistics, input_metric, output_importance

__all__ = ["DISTORTIONS", "allocate", "expected_loss"]

#: Mean squared error of the trellis code on unit Gaussians, by bits per pair (docs/log.md).
DISTORTIONS = {6: 0.01757, 7: 0.0090, 8: 0.00475}
_BISECTIONS = 100


def expected_loss(weights: Sequence[np.ndarray], statistics: GroupStatistics, rotation_block: int) -> float:
    """What a code of unit distortion would cost a group, in the units of its statistics.

    Args:
        weights: float32 [N_i, K].
        statistics: with outputs.
        rotation_block: the largest Hadamard block.

    Returns:
        A number of at least 0; 0 when the statistics are of no use. Values that are not finite are left out.
    """
    columns = scales.trellis_input_scale(list(weights)).astype(np.float32)
    metric = input_metric(GroupStatistics(statistics.inputs), columns, rotation.choose_block([weights[0].shape[1]], rotation_block))
    if metric.factor.diagonal is None or statistics.outputs is None:
        return 0.0
    block, total = rotation.choose_block([weight.shape[0] for weight in weights], rotation_block), 0.0
    for weight, sensitivity in zip(weights, statistics.outputs):
        matters = output_importance(sensitivity)
        size = scales.trellis_output_scale(scales.row_norms(weight, columns), block, matters)
        total += scales.sum_all(size**2 * matters)
    return total * scales.sum_all(metric.factor.diagonal)


def allocate(sizes: Sequence[int], losses: Sequence[float] | None, average: float) -> list[int]:
    """Choose a width for each group.

    Args:
        sizes: weights in each group, at least 1.
        losses: from `expected_loss`, one per group; None: not known, then widths are spread evenly.
        average: bits per weight over all groups, 3.0 to 4.0; it is not exceeded.

    Returns:
        6, 7 or 8 bits per pair for each group.
    """
    budget = 2 * average * sum(sizes)
    if losses is None:
        return _spread(sizes, average)
    cheap, dear = 0.0, max(losses, default=0.0) * DISTORTIONS[BITS_PER_PAIR[0]] + 1.0
    for _ in range(_BISECTIONS):
        price = (cheap + dear) / 2
        cheap, dear = (cheap, price) if _cost(_best(sizes, losses, price), sizes) <= budget else (price, dear)
    widths = _best(sizes, losses, dear)
    left = budget - _cost(widths, sizes)
    # Most gain per weight first; ties in the order of the model.
    gains = sorted(range(len(sizes)), key=lambda group: (-_gain(losses[group], widths[group]) / sizes[group], group))
    for group in gains:
        if widths[group] < BITS_PER_PAIR[-1] and sizes[group] <= left:
            widths[group] += 1
            left -= sizes[group]
    return widths


def _best(sizes: Sequence[int], losses: Sequence[float], price: float) -> list[int]:
    """The width of each group that minimizes loss + price * bits per weight; ties to fewer bits."""
    return [
        min(BITS_PER_PAIR, key=lambda bits, loss=loss, size=size: (loss / size * DISTORTIONS[bits] + price * bits, bits))
        for loss, size in zip(losses, sizes)
    ]


def _cost(widths: Sequence[int], sizes: Sequence[int]) -> int:
    return sum(bits * size for bits, size in zip(widths, sizes))


def _gain(loss: float, bits: int) -> float:
    """What one more bit saves."""
    return loss * (DISTORTIONS[bits] - DISTORTIONS.get(bits + 1, DISTORTIONS[bits]))


def _spread(sizes: Sequence[int], average: float) -> list[int]:
    """Widths next to the average, so that the average so far is never exceeded by more than a group can help."""
    lower = min(int(2 * average), BITS_PER_PAIR[-1])
    widths, spare = [], 0.0
    for size in sizes:
        spare += (2 * average - lower) * size
        more = spare >= size and lower < BITS_PER_PAIR[-1]
        widths.append(lower + more)
        spare -= size * more
    return widths
