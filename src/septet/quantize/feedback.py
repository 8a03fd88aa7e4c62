"""Error feedback over the trellis: every tile is encoded with the errors made so far subtracted, as far as it can make up for them.

Inputs are encoded in tiles of four, from the last to the first. A tile's target is

    w[rows, tile] - sum over tiles encoded before of transpose(M)[rows, before] errors L[before, tile]

with L from the factorization of the Hessian of the inputs, and M of that of the outputs, where there is one: then rows of tiles are
encoded from the last to the first as well, each one tile behind the next. Without it M = 1, outputs do not know each other, and all
rows of tiles move together. Sheets of one fused group share the calls of the encoder.

The sum over inputs that were encoded in earlier batches is one matrix product per batch. Errors and coefficients are whole numbers
small enough for exact float64 sums, so neither the batch size nor threads nor the machine change a bit.

Reference: block LDLQ after Tseng et al. 2024 (QuIP#, arXiv 2402.04396; QTIP, 2406.11235); both sides after Tseng et al. 2025 (YAQA,
2505.22988); lazy batches after Frantar et al. 2023 (GPTQ).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from septet.codes import trellis
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS, WEIGHTS_PER_TILE, tile_bytes, tile_grid, tiles_of_matrix
from septet.errors import OptionError, ShapeError
from septet.kernels import select_backend
from septet.quantize.factorization import ERROR_BITS, Factor

__all__ = ["BATCH_INPUTS", "Sheet", "encode_sheets"]

#: Inputs between two large products; a matter of speed alone.
BATCH_INPUTS = 128
#: Errors are counted in 1/16 of the encoder's quarter levels.
ERROR_SHIFT = 4


@dataclass(frozen=True, eq=False)
class Sheet:
    """Rows to encode: float32 [N, K], finite, in standard deviations; and the factor of their outputs, in tiles of 64."""

    rotated: np.ndarray
    outputs: Factor = Factor(None)


def encode_sheets(
    sheets: Sequence[Sheet], factor: Factor, bits: int, threads: int = 0, batch_inputs: int = BATCH_INPUTS
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Encode rotated weights.

    Args:
        sheets: at least one, with the same K.
        factor: of the Hessian of the inputs in the same basis. Without coefficients weights are rounded plainly.
        bits: bits per pair, 6, 7 or 8.
        threads: 0 is the default number; the result does not depend on it.
        batch_inputs: a multiple of 4; the result does not depend on it.

    Returns:
        For each sheet (packed uint8 [ceil(N/64), ceil(K/4) * 16*bits], levels int8 [N, K]).

    Raises:
        OptionError: `batch_inputs` is no multiple of 4.
        ShapeError: a factor belongs to another number of inputs or outputs.
    """
    if batch_inputs < TILE_INPUTS or batch_inputs % TILE_INPUTS:
        raise OptionError("batch_inputs must be a multiple of 4", batch_inputs, f"use {BATCH_INPUTS}")
    if factor.coefficients is None:
        return [_encode_plainly(sheet.rotated, bits, threads) for sheet in sheets]
    for sheet in sheets:
        for axis, known, hint in ((1, factor, "inputs"), (0, sheet.outputs, "outputs")):
            if known.coefficients is not None and len(known.coefficients) != sheet.rotated.shape[axis]:
                wanted = f"the factor must have {sheet.rotated.shape[axis]} {hint}"
                raise ShapeError(wanted, len(known.coefficients), f"take the Hessian of this layer's own {hint}")
    size = tile_grid(*sheets[0].rotated.shape)[1] * TILE_INPUTS
    coefficients = np.zeros((size, size))
    coefficients[: len(factor.coefficients), : len(factor.coefficients)] = factor.coefficients
    works = [_Work(sheet, coefficients, factor.shift, bits, batch_inputs) for sheet in sheets]
    bands = [band for work in works for band in work.bands]
    columns = works[0].packed.shape[1]
    for step in range(columns + max(band.delay for band in bands)):
        ready = [(band, columns - 1 - step + band.delay) for band in bands if 0 <= step - band.delay < columns]
        _encode_step(ready, bits, threads)
    return [work.result() for work in works]


def _encode_plainly(rotated: np.ndarray, bits: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """All tiles at once: packed and levels as `encode_sheets`."""
    backend = select_backend()
    fixed = tiles_of_matrix(trellis.to_fixed(rotated, bits))
    symbols = backend.trellis_encode(fixed.reshape(-1, WEIGHTS_PER_TILE), bits, threads)
    packed = backend.pack(symbols.reshape(*fixed.shape[:2], -1), bits)
    return packed, backend.trellis_levels(packed, bits)[: rotated.shape[0], : rotated.shape[1]]


def _encode_step(ready: list[tuple[_Band, int]], bits: int, threads: int) -> None:
    """Encode one column of tiles of each band in one call of the encoder."""
    backend = select_backend()
    wanted = np.concatenate([band.wanted(column) for band, column in ready])
    np.rint(wanted, out=wanted)
    np.clip(wanted, -trellis.FIXED_LIMIT, trellis.FIXED_LIMIT, out=wanted)
    coded = backend.pack(backend.trellis_encode(wanted.astype(np.int16).reshape(-1, WEIGHTS_PER_TILE), bits, threads)[:, None], bits)
    levels = backend.trellis_levels(coded, bits)
    exact = levels * float(trellis.FIXED_PER_LEVEL)
    first = 0
    for band, column in ready:
        tiles = slice(first, first + band.tiles)
        rows = slice(tiles.start * TILE_OUTPUTS, tiles.stop * TILE_OUTPUTS)
        band.accept(column, coded[tiles], levels[rows], exact[rows])
        first = tiles.stop


class _Work:
    """A sheet while it is encoded; sizes are rounded up to whole tiles, R*64 and T*4.

    Attributes:
        weights: float64 [R*64, T*4], in quarter levels; 0 in the padding.
        packed: uint8 [R, T, 16*bits].
        levels: int8 [R*64, T*4].
        errors: float64 [R*64, T*4], (level - weight) of what has been encoded, whole numbers of 1/16 quarter levels; 0 elsewhere.
        mixed: transpose(M) errors, rounded; the errors themselves without M.
        bands: rows of tiles, each moving on its own; one band for all without M.
    """

    def __init__(self, sheet: Sheet, coefficients: np.ndarray, shift: int, bits: int, batch_inputs: int) -> None:
        rows, columns = tile_grid(*sheet.rotated.shape)
        self.size = outputs, inputs = sheet.rotated.shape
        self.coefficients, self.batch_inputs, self.per_input = coefficients, batch_inputs, 0.5 ** (shift + ERROR_SHIFT)
        padded = rows * TILE_OUTPUTS, columns * TILE_INPUTS
        self.weights = np.zeros(padded)
        # The same product as in `to_fixed`, so that an empty sum leaves what plain rounding sees.
        self.weights[:outputs, :inputs] = sheet.rotated * np.float32(trellis.FIXED_PER_LEVEL * trellis.WIDTHS[bits].levels_per_sigma)
        self.packed = np.empty((rows, columns, tile_bytes(bits)), np.uint8)
        self.levels = np.empty(padded, np.int8)
        self.errors = np.zeros(padded)
        self.per_output = 0.5**sheet.outputs.shift
        if sheet.outputs.coefficients is None:
            self.mixed, self.bands = self.errors, [_Band(self, 0, rows, None)]
        else:
            across = np.zeros((len(self.errors), len(self.errors)))
            across[:outputs, :outputs] = sheet.outputs.coefficients.T
            self.mixed = np.zeros(padded)
            self.bands = [_Band(self, row, row + 1, across) for row in range(rows)]

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed and levels."""
        outputs, inputs = self.size
        return self.packed.reshape(len(self.packed), -1), self.levels[:outputs, :inputs]


class _Band:
    """Rows of tiles that reach a column at the same time.

    Attributes:
        tiles: how many rows of tiles.
        delay: how many columns it is behind the last row of tiles.
    """

    def __init__(self, work: _Work, first: int, last: int, across: np.ndarray | None) -> None:
        self._work, self._first, self.tiles = work, first, last - first
        self.delay = 0 if across is None else len(work.packed) - last
        self._rows = slice(first * TILE_OUTPUTS, last * TILE_OUTPUTS)
        self._later = slice(last * TILE_OUTPUTS, None)
        #: How errors of later rows of tiles reach this one.
        self._across = None if across is None else np.ascontiguousarray(across[self._rows, self._later])
        self._batch_start, self._batch_stop = len(work.coefficients), 0
        self._before = np.empty((0, 0))
        self._from_rows = np.empty((0, 0))

    def wanted(self, column: int) -> np.ndarray:
        """What to encode, before rounding: float64 [tiles * 64, 4]."""
        work, rows, start = self._work, self._rows, column * TILE_INPUTS
        stop, coefficients = start + TILE_INPUTS, work.coefficients
        if start < self._batch_start:
            self._batch_start = start // work.batch_inputs * work.batch_inputs
            self._batch_stop = min(self._batch_start + work.batch_inputs, len(coefficients))
            after = slice(self._batch_stop, None)
            self._before = work.mixed[rows, after] @ coefficients[after, self._batch_start : self._batch_stop]
        inside = slice(stop, self._batch_stop)
        sums = work.mixed[rows, inside] @ coefficients[inside, start:stop]
        sums += self._before[:, start - self._batch_start : stop - self._batch_start]
        sums *= work.per_input
        if self._across is not None:
            self._from_rows = (self._across @ work.errors[self._later, start:stop]) * work.per_output
            sums += self._from_rows * 0.5**ERROR_SHIFT
        wanted = work.weights[rows, start:stop] - sums
        self._clear_padding(wanted, column)
        return wanted

    def accept(self, column: int, coded: np.ndarray, levels: np.ndarray, exact: np.ndarray) -> None:
        """Take over what the encoder made of it: uint8 [tiles, 16*bits], int8 [tiles * 64, 4], and that in quarter levels, float64."""
        work, rows, tile = self._work, self._rows, slice(column * TILE_INPUTS, (column + 1) * TILE_INPUTS)
        work.packed[self._first : self._first + self.tiles, column] = coded
        work.levels[rows, tile] = levels
        errors = _whole((exact - work.weights[rows, tile]) * 2.0**ERROR_SHIFT)
        self._clear_padding(errors, column)
        work.errors[rows, tile] = errors
        if self._across is not None:
            work.mixed[rows, tile] = _whole(errors + self._from_rows)

    def _clear_padding(self, values: np.ndarray, column: int) -> None:
        """Padding is encoded as 0 and makes no errors."""
        outputs, inputs = self._work.size
        if outputs < self._rows.stop:
            values[outputs - self._rows.start :] = 0
        if inputs < (column + 1) * TILE_INPUTS:
            values[:, inputs - column * TILE_INPUTS :] = 0


def _whole(errors: np.ndarray) -> np.ndarray:
    """Whole numbers that exact sums have room for, in place."""
    largest = 2.0**ERROR_BITS
    return np.clip(np.rint(errors, out=errors), -largest, largest, out=errors)
