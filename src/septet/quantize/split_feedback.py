"""Error feedback for the memoryless code: inputs are rounded one tile after the other, with the errors made so far subtracted.

The order is free, because scales are chosen before: inputs go in the order of the damage that rounding does to them, their own part of
the Hessian times the squared step of their field. So coarse fields and strong inputs come first, and everything after makes up for
them. What is left of an error when all later inputs have done so is its pivot in the factorization; ranges are chosen by it.

Errors are whole numbers of a power of two per row, small enough for exact sums (see `exact`), so threads and batches change no bit.

Reference: Frantar et al. 2023 (GPTQ, arXiv 2210.17323), with its order by activations; blocks of four as in `factorization`.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from septet.codes.split import FIELD_MAX, zero_points
from septet.codes.tile import TILE_INPUTS
from septet.quantize import exact
from septet.quantize.factorization import ERROR_BITS, Factor, drop_damaged, factorize
from septet.quantize.threads import default_threads

__all__ = ["BATCH_INPUTS", "Plan", "encode_fields", "plan_feedback"]

#: Inputs between two large products; a matter of speed alone.
BATCH_INPUTS = 128
#: Weights of one piece of rows.
_PIECE_WEIGHTS = 1 << 22
#: Parts of the mean diagonal that are added to the diagonal, tried in this order.
_DAMPINGS = (0.01, 0.03, 0.1)
#: A step of the 3-bit field is about twice one of the 4-bit field.
_DAMAGE = (1.0, 4.0)


@dataclass(frozen=True, eq=False)
class Plan:
    """What feedback needs to know about the inputs of a layer.

    Args:
        order: int [K]; inputs are rounded from the last of them to the first.
        factor: of the Hessian in that order.
        importance: float32 [K], largest 1, how much a squared error of an input counts in the end; None: all the same.
    """

    order: np.ndarray
    factor: Factor
    importance: np.ndarray | None


def plan_feedback(hessian: np.ndarray | None) -> Plan | None:
    """Choose the order and factorize.

    Args:
        hessian: float64 [K, K], mean of x transpose(x), not checked for damage.

    Returns:
        None where nothing can be gained: no Hessian, or none that damping makes usable.
    """
    if hessian is None:
        return None
    usable = drop_damaged(hessian)
    damage = usable.diagonal() * np.where(np.arange(len(usable)) % 2, *_DAMAGE[::-1])
    order = np.argsort(damage, kind="stable")
    factor = factorize(usable[np.ix_(order, order)], _DAMPINGS)
    if factor.coefficients is None:
        return None
    importance = np.empty(len(order), np.float32)
    importance[order] = factor.diagonal / factor.diagonal.max()
    return Plan(order, factor, None if (importance == importance[0]).all() else importance)


def encode_fields(
    weight: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, plan: Plan, threads: int = 0, batch_inputs: int = BATCH_INPUTS
) -> np.ndarray:
    """Round weights to fields of the split code.

    Args:
        weight: float32 [N, K], finite.
        scale: float32 [N or 1, K], of every field, not negative.
        offset: float32 like `scale`, the value of code 0; None: -zero point * scale.
        plan: of the layer's Hessian.
        threads: 0 is the default number; the result does not depend on it.
        batch_inputs: a multiple of 4; the result does not depend on it.

    Returns:
        uint8 [N, K], 0..15 at even and 0..7 at odd inputs.
    """
    outputs, inputs = weight.shape
    codes = np.empty(weight.shape, np.uint8)
    rows_at_once = max(1, _PIECE_WEIGHTS // inputs)

    def work(start: int) -> None:
        rows = slice(start, start + rows_at_once)
        shared = slice(None) if len(scale) == 1 else rows
        sweep = _Sweep(weight[rows], scale[shared], None if offset is None else offset[shared], plan)
        for first in range((inputs - 1) // batch_inputs * batch_inputs, -1, -batch_inputs):
            sweep.encode_batch(first, min(first + batch_inputs, inputs))
        codes[rows, plan.order] = sweep.codes

    with ThreadPoolExecutor(threads or default_threads()) as pool:
        list(pool.map(work, range(0, outputs, rows_at_once)))
    return codes


class _Sweep:
    """One pass over the inputs of some rows; all arrays are in the order of the plan.

    Attributes:
        codes: uint8 [N, K].
        errors: float64 [N, K], (dequantized - weight) of what has been rounded, whole numbers of 2^unit; 0 elsewhere.
        unit: int [N, 1].
    """

    def __init__(self, weight: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, plan: Plan) -> None:
        order = plan.order
        self.weight, self.scale = weight[:, order], scale[:, order]
        self.largest = np.where(order % 2, *FIELD_MAX[::-1])
        self.zero = zero_points(len(order))[order].astype(np.float32)
        self.offset = None if offset is None else offset[:, order]
        self.factor = plan.factor
        reach = np.abs(self.lowest(slice(None))) + self.scale * self.largest
        reach = np.maximum(reach.max(axis=1, keepdims=True), np.abs(weight).max(axis=1, keepdims=True))
        # Errors are clipped at four times the largest value of the row, far beyond what helps.
        self.unit = exact.ceil_log2(reach.astype(np.float64)) + 2 - ERROR_BITS
        self.codes = np.empty(weight.shape, np.uint8)
        self.errors = np.zeros(weight.shape)

    def lowest(self, columns: slice) -> np.ndarray:
        """The value of code 0: float32 [N or 1, columns]."""
        return self.scale[:, columns] * -self.zero[columns] if self.offset is None else self.offset[:, columns]

    def encode_batch(self, start: int, stop: int) -> None:
        """Round the inputs start..stop-1, all later ones being done."""
        coefficients = self.factor.coefficients
        before = self.errors[:, stop:] @ coefficients[stop:, start:stop]
        for first in range(start + (stop - 1 - start) // TILE_INPUTS * TILE_INPUTS, start - 1, -TILE_INPUTS):
            tile = slice(first, min(first + TILE_INPUTS, stop))
            sums = self.errors[:, tile.stop : stop] @ coefficients[tile.stop : stop, tile]
            sums += before[:, tile.start - start : tile.stop - start]
            self._encode_tile(tile, np.ldexp(sums, self.unit - self.factor.shift))

    def _encode_tile(self, tile: slice, feedback: np.ndarray) -> None:
        """Round a tile: the same float32 operations as without feedback, so that no feedback gives the same codes."""
        weight, scale = self.weight[:, tile].astype(np.float64), self.scale[:, tile]
        codes = (weight - feedback).astype(np.float32) - self.lowest(tile)
        codes /= np.where(scale == 0, np.float32(np.inf), scale)
        codes = np.clip(np.rint(codes), 0, self.largest[tile].astype(np.float32))
        self.codes[:, tile] = codes
        decoded = scale * (codes - self.zero[tile]) if self.offset is None else scale * codes + self.offset[:, tile]
        errors = np.rint(np.ldexp(decoded.astype(np.float64) - weight, -self.unit))
        largest = 2.0**ERROR_BITS
        self.errors[:, tile] = np.clip(errors, -largest, largest)
