"""The integer grids of GPTQ and AWQ as the field stores them: per group an fp16 scale and a whole zero point of `bits` bits.

A value is scale * (code - zero), code 0 .. 2^bits - 1. Symmetric grids have the zero point in the middle and do not store it.
The range always includes 0. It may be shrunk, where a search finds that the outputs of the layer get better.

Reference: the layout of Frantar et al. 2023 (GPTQ, arXiv 2210.17323); the search of Lin et al. 2024 (AWQ, arXiv 2306.00978).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet.errors import OptionError
from septet.quantize.scales import round_to_float16

__all__ = ["Grid", "GridStyle", "fit_grid", "round_to_grid", "search_grid", "units_of"]

#: Parts of the range that a search tries.
_SHRINKS = tuple(1 - step / 20 for step in range(11))
_SCALE_BITS = 16


@dataclass(frozen=True)
class GridStyle:
    """What kind of grid.

    Args:
        bits: 2..8.
        symmetric: the zero point is in the middle.
        group_size: inputs that share a scale, a divisor of the layer's inputs; None: the whole row.
        search: shrink ranges where that lowers the error of the outputs.

    Raises:
        OptionError: bits cannot be used.
    """

    bits: int
    symmetric: bool = False
    group_size: int | None = None
    search: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise OptionError("a grid must have 2..8 bits", self.bits, "use 3, 4 or 8")

    def width(self, inputs: int) -> int:
        """Inputs per group of a layer.

        Raises:
            OptionError: the group size does not divide the inputs.
        """
        width = self.group_size or inputs
        if inputs % width:
            raise OptionError(f"group_size must divide the {inputs} inputs", width, "use another group size, or none")
        return width

    def bits_per_weight(self, inputs: int) -> float:
        """Code, scale and zero point, per weight."""
        return self.bits + (_SCALE_BITS + (0 if self.symmetric else self.bits)) / self.width(inputs)


@dataclass(frozen=True, eq=False)
class Grid:
    """Grids of U groups: scale float32 [U] as fp16 holds it, zero float32 [U] whole numbers, largest code."""

    scale: np.ndarray
    zero: np.ndarray
    largest: int


def units_of(weight: np.ndarray, width: int) -> np.ndarray:
    """Rows cut into groups: [N, K] -> [N * K / width, width], without a copy if possible."""
    return weight.reshape(-1, width)


def fit_grid(units: np.ndarray, style: GridStyle, shrink: float | np.ndarray = 1.0) -> Grid:
    """The grid from the smallest to the largest value.

    Args:
        units: float [U, width].
        style: bits and symmetry.
        shrink: parts of the range, a number or float [U].
    """
    largest = 2**style.bits - 1
    low = np.minimum(units.min(axis=1), 0) * shrink
    high = np.maximum(units.max(axis=1), 0) * shrink
    if style.symmetric:
        high = np.maximum(-low, high)
        low = -high
    scale = round_to_float16(((high - low) / largest).astype(np.float64), "the baseline").astype(np.float32)
    zero = np.rint(-low / np.where(scale == 0, np.float32(np.inf), scale))
    middle = np.full_like(scale, 2 ** (style.bits - 1))
    return Grid(scale, middle if style.symmetric else np.clip(zero, 0, largest).astype(np.float32), largest)


def round_to_grid(units: np.ndarray, grid: Grid) -> np.ndarray:
    """The nearest values of the grids: float [U, width] -> the same."""
    scale, zero = grid.scale[:, None], grid.zero[:, None]
    codes = np.clip(np.rint(units / np.where(scale == 0, np.float32(np.inf), scale)) + zero, 0, grid.largest)
    return (codes - zero) * scale


def search_grid(weight: np.ndarray, style: GridStyle, hessian: np.ndarray) -> Grid:
    """The grids of a matrix, each shrunk as far as the error of the outputs falls, other groups aside.

    Args:
        weight: float [N, K].
        style: the kind of grid; without `search` nothing is shrunk.
        hessian: float64 [K, K]; only its blocks of one group are used.
    """
    outputs, inputs = weight.shape
    width = style.width(inputs)
    units = units_of(weight, width)
    if not style.search:
        return fit_grid(units, style)
    groups = inputs // width
    blocks = np.stack([hessian[start : start + width, start : start + width] for start in range(0, inputs, width)])
    best, least = np.ones(len(units)), np.full(len(units), np.inf)
    for shrink in _SHRINKS:
        errors = (round_to_grid(units, fit_grid(units, style, shrink)) - units).reshape(outputs, groups, width).swapaxes(0, 1)
        loss = ((errors @ blocks) * errors).sum(axis=2).T.reshape(-1)
        better = loss < least
        best[better], least[better] = shrink, loss[better]
    return fit_grid(units, style, best)
