"""GPTQ, to compare with: inputs are rounded one after the other, and each error is taken over by the inputs still to come.

Written from the paper. With activation order the inputs with the largest second moment come first; groups stay what neighbours in the
file are, so their grids are fixed before and no index has to be stored ("static groups"). In file order a group's grid is fitted when
its turn comes, to the weights as changed by then. A Hessian that cannot be used leaves plain rounding.

It is a yardstick, not a codec: nothing is packed, and sums are NumPy's own, so last bits may depend on the machine.

Reference: Frantar et al. 2023 (GPTQ, arXiv 2210.17323), algorithm 1.
"""

from __future__ import annotations

import numpy as np

from septet.quantize.baselines import Baseline
from septet.quantize.factorization import drop_damaged
from septet.quantize.grids import Grid, GridStyle, fit_grid, round_to_grid, search_grid

__all__ = ["quantize_gptq"]

_BATCH = 128
#: Parts of the mean diagonal added to the diagonal: the paper's, and more where that does not help.
_DAMPINGS = (0.01, 0.03, 0.1)


def quantize_gptq(weight: np.ndarray, hessian: np.ndarray | None, style: GridStyle, activation_order: bool = True) -> Baseline:
    """Round a matrix with GPTQ.

    Args:
        weight: float32 [N, K], finite.
        hessian: float64 [K, K], mean of x transpose(x); None: plain rounding.
        style: bits, symmetry and groups.
        activation_order: inputs by falling second moment instead of file order.

    Returns:
        The dequantized weight, and its bits with scales and zero points.

    Raises:
        OptionError: the group size does not divide the inputs.
    """
    inputs = weight.shape[1]
    bits = style.bits_per_weight(inputs)
    usable = np.eye(inputs) if hessian is None else drop_damaged(hessian)
    order = np.argsort(-usable.diagonal(), kind="stable") if activation_order else np.arange(inputs)
    factor = _inverse_factor(usable[np.ix_(order, order)])
    if factor is None:
        factor = np.eye(inputs)
    static = search_grid(weight, style, usable) if activation_order or style.group_size is None else None
    rounded = np.empty_like(weight)
    rounded[:, order] = _sweep(weight[:, order].astype(np.float64), order, factor, static, style)
    return Baseline(rounded, bits)


def _inverse_factor(hessian: np.ndarray) -> np.ndarray | None:
    """Upper triangular U with transpose(U) U = inverse of the damped Hessian; None when no damping helps."""
    mean = hessian.diagonal().mean()
    if not 0 < mean < np.inf:
        return None
    for damping in _DAMPINGS:
        damped = hessian + damping * mean * np.eye(len(hessian))
        try:
            np.linalg.cholesky(damped)
            return np.linalg.cholesky(np.linalg.inv(damped)).T
        except np.linalg.LinAlgError:
            continue
    return None


def _sweep(weight: np.ndarray, order: np.ndarray, factor: np.ndarray, static: Grid | None, style: GridStyle) -> np.ndarray:
    """Round the columns of float64 [N, K] from the first to the last; `weight` is used up.

    Args:
        weight: in the order of the sweep.
        order: int [K], the number of each column in the file.
        factor: float64 [K, K], upper triangular.
        static: grids of the groups of the file, or None to fit them on the way.
        style: of the grids.
    """
    outputs, inputs = weight.shape
    width = style.width(inputs)
    rounded = np.empty_like(weight)
    for start in range(0, inputs, _BATCH):
        stop = min(start + _BATCH, inputs)
        errors = np.empty((outputs, stop - start))
        for column in range(start, stop):
            if static is None and column % width == 0:
                # What other batches have to say about the rest of the group has been said, if groups do not cross batches.
                current = fit_grid(weight[:, column : column + width].astype(np.float32), style)
            grid = current if static is None else _of_group(static, order[column] // width, inputs // width)
            rounded[:, column] = round_to_grid(weight[:, column, None], grid)[:, 0]
            errors[:, column - start] = (weight[:, column] - rounded[:, column]) / factor[column, column]
            weight[:, column + 1 : stop] -= errors[:, column - start, None] * factor[column, column + 1 : stop]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return rounded


def _of_group(grids: Grid, group: int, groups: int) -> Grid:
    """The grids of one group of every row."""
    return Grid(grids.scale[group::groups], grids.zero[group::groups], grids.largest)
