"""Error feedback over the trellis: every tile is encoded with the errors made so far subtracted, as far as it can make up for them.

Inputs are encoded in tiles of four, from the last to the first; all rows of tiles of such a column go through the encoder in one
call. Outputs do not know each other. A tile's target is

    w[:, tile] - errors[:, encoded so far] @ L[encoded so far, tile]

with L from `factorization`. The sum over inputs that were encoded in earlier batches is one matrix product per batch. Errors and
coefficients are whole numbers small enough for exact float64 sums, so neither the batch size nor threads nor the machine change a bit.
Without a factor this is plain rounding.

Reference: block LDLQ after Tseng et al. 2024 (QuIP#, arXiv 2402.04396; QTIP, 2406.11235); lazy batches after Frantar et al. 2023 (GPTQ).
"""

from __future__ import annotations

import numpy as np

from septet.codes import trellis
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS, WEIGHTS_PER_TILE, tile_bytes, tile_grid, tiles_of_matrix
from septet.errors import OptionError, ShapeError
from septet.kernels import select_backend
from septet.quantize.factorization import ERROR_BITS, Factor

__all__ = ["BATCH_INPUTS", "encode_with_feedback"]

#: Inputs between two large products; a matter of speed alone.
BATCH_INPUTS = 128
#: Errors are counted in 1/16 of the encoder's quarter levels.
_ERROR_SHIFT = 4


def encode_with_feedback(
    rotated: np.ndarray, factor: Factor, bits: int, threads: int = 0, batch_inputs: int = BATCH_INPUTS
) -> tuple[np.ndarray, np.ndarray]:
    """Encode rotated weights.

    Args:
        rotated: float32 [N, K], finite, in standard deviations.
        factor: of the layer's Hessian in the same basis.
        bits: bits per pair, 6, 7 or 8.
        threads: 0 is the default number; the result does not depend on it.
        batch_inputs: a multiple of 4; the result does not depend on it.

    Returns:
        (packed uint8 [ceil(N/64), ceil(K/4) * 16*bits], levels int8 [N, K]).

    Raises:
        OptionError: `batch_inputs` is no multiple of 4.
        ShapeError: the factor belongs to another number of inputs.
    """
    if batch_inputs < TILE_INPUTS or batch_inputs % TILE_INPUTS:
        raise OptionError("batch_inputs must be a multiple of 4", batch_inputs, f"use {BATCH_INPUTS}")
    if factor.coefficients is None:
        return _encode_plainly(rotated, bits, threads)
    if len(factor.coefficients) != rotated.shape[1]:
        hint = "take the Hessian of this layer's own inputs"
        raise ShapeError(f"the factor must have {rotated.shape[1]} inputs", len(factor.coefficients), hint)
    sweep = _Sweep(rotated, factor, bits, threads)
    padded_inputs = sweep.levels.shape[1]
    for start in range((padded_inputs - 1) // batch_inputs * batch_inputs, -1, -batch_inputs):
        sweep.encode_batch(start, min(start + batch_inputs, padded_inputs))
    outputs, inputs = rotated.shape
    return sweep.packed.reshape(len(sweep.packed), -1), sweep.levels[:outputs, :inputs]


def _encode_plainly(rotated: np.ndarray, bits: int, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """All tiles at once: packed and levels as `encode_with_feedback`."""
    backend = select_backend()
    fixed = tiles_of_matrix(trellis.to_fixed(rotated, bits))
    symbols = backend.trellis_encode(fixed.reshape(-1, WEIGHTS_PER_TILE), bits, threads)
    packed = backend.pack(symbols.reshape(*fixed.shape[:2], -1), bits)
    return packed, backend.trellis_levels(packed, bits)[: rotated.shape[0], : rotated.shape[1]]


class _Sweep:
    """The state of one pass over the inputs.

    Attributes:
        packed: uint8 [R, T, 16*bits].
        levels: int8 [R*64, T*4].
        errors: float64 [N, K], (level - weight) of what has been encoded, whole numbers of 1/16 quarter levels; 0 elsewhere.
    """

    def __init__(self, rotated: np.ndarray, factor: Factor, bits: int, threads: int) -> None:
        rows, columns = tile_grid(*rotated.shape)
        self.bits, self.threads, self.backend = bits, threads, select_backend()
        self.coefficients, self.shift = factor.coefficients, factor.shift
        # The same product as in `to_fixed`, so that an empty sum leaves what plain rounding sees.
        self.weights = rotated * np.float32(trellis.FIXED_PER_LEVEL * trellis.WIDTHS[bits].levels_per_sigma)
        self.packed = np.empty((rows, columns, tile_bytes(bits)), np.uint8)
        self.levels = np.empty((rows * TILE_OUTPUTS, columns * TILE_INPUTS), np.int8)
        self.errors = np.zeros(rotated.shape)

    def encode_batch(self, start: int, stop: int) -> None:
        """Encode the inputs start..stop-1, all later ones being done."""
        before = self.errors[:, stop:] @ self.coefficients[stop:, start:stop]
        for first in range(stop - TILE_INPUTS, start - 1, -TILE_INPUTS):
            tile = slice(first, min(first + TILE_INPUTS, self.errors.shape[1]))
            sums = self.errors[:, tile.stop : stop] @ self.coefficients[tile.stop : stop, tile]
            sums += before[:, tile.start - start : tile.stop - start]
            self._encode_tile(tile, np.ldexp(sums, -self.shift - _ERROR_SHIFT))

    def _encode_tile(self, tile: slice, feedback: np.ndarray) -> None:
        """Encode one column of tiles.

        Args:
            tile: its inputs, without padding.
            feedback: float64 [N, inputs of the tile], what to subtract, in quarter levels.
        """
        weights = self.weights[:, tile].astype(np.float64)
        target = np.zeros((len(self.levels), TILE_INPUTS), np.int16)
        wanted = np.clip(np.rint(weights - feedback), -trellis.FIXED_LIMIT, trellis.FIXED_LIMIT)
        target[: len(weights), : weights.shape[1]] = wanted
        symbols = self.backend.trellis_encode(target.reshape(-1, WEIGHTS_PER_TILE), self.bits, self.threads)
        coded = self.backend.pack(symbols[:, None], self.bits)
        levels = self.backend.trellis_levels(coded, self.bits)
        self.packed[:, tile.start // TILE_INPUTS] = coded
        self.levels[:, tile.start : tile.start + TILE_INPUTS] = levels
        exact = trellis.FIXED_PER_LEVEL * levels[: len(weights), : weights.shape[1]].astype(np.float64) - weights
        largest = 2.0**ERROR_BITS
        self.errors[:, tile] = np.clip(np.rint(np.ldexp(exact, _ERROR_SHIFT)), -largest, largest)
