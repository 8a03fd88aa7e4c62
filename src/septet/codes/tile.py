"""The geometry that all packed codes share: tiles, pairs and stream order.

A weight matrix [N, K] is cut into tiles of 64 outputs x 4 inputs = 256 weights = 128 pairs. The stream of a tile runs over
its outputs, and inside an output over its four inputs: stream position 4*o + i is the weight of output o, input i. Pair p
is the stream positions 2*p and 2*p + 1, so both weights of a pair belong to one output.
Sizes round up to whole tiles; what lies outside the true matrix is padding.
"""

from __future__ import annotations

import numpy as np

from septet.errors import OptionError, ShapeError

__all__ = [
    "BITS_PER_PAIR",
    "PAIRS_PER_TILE",
    "TILE_INPUTS",
    "TILE_OUTPUTS",
    "WEIGHTS_PER_TILE",
    "check_bits",
    "matrix_of_tiles",
    "tile_bytes",
    "tile_grid",
    "tiles_of_matrix",
]

TILE_OUTPUTS = 64
TILE_INPUTS = 4
WEIGHTS_PER_TILE = TILE_OUTPUTS * TILE_INPUTS
PAIRS_PER_TILE = WEIGHTS_PER_TILE // 2
BITS_PER_PAIR = (6, 7, 8)


def check_bits(bits: int) -> None:
    """Raise unless `bits` is a width a pair can have.

    Raises:
        OptionError: `bits` is not 6, 7 or 8.
    """
    if bits not in BITS_PER_PAIR:
        raise OptionError("bits per pair must be 6, 7 or 8", bits, "choose 3.0, 3.5 or 4.0 bits per weight")


def tile_bytes(bits: int) -> int:
    """Bytes of one tile: 96, 112 or 128 for 6, 7 or 8 bits per pair."""
    check_bits(bits)
    return PAIRS_PER_TILE * bits // 8


def tile_grid(out_features: int, in_features: int) -> tuple[int, int]:
    """Rows and columns of tiles that cover a matrix of [out_features, in_features].

    Raises:
        ShapeError: a size is smaller than 1.
    """
    if out_features < 1 or in_features < 1:
        raise ShapeError("a weight matrix must have at least one row and one column", [out_features, in_features], "skip this layer")
    return -(-out_features // TILE_OUTPUTS), -(-in_features // TILE_INPUTS)


def tiles_of_matrix(matrix: np.ndarray) -> np.ndarray:
    """Cut a matrix into tiles in stream order, with zeros as padding.

    Args:
        matrix: [N, K], any dtype.

    Returns:
        [ceil(N/64), ceil(K/4), 256], the dtype of `matrix`.
    """
    rows, columns = tile_grid(*matrix.shape)
    padded = np.zeros((rows * TILE_OUTPUTS, columns * TILE_INPUTS), matrix.dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    tiles = padded.reshape(rows, TILE_OUTPUTS, columns, TILE_INPUTS).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(rows, columns, WEIGHTS_PER_TILE)


def matrix_of_tiles(tiles: np.ndarray) -> np.ndarray:
    """Undo `tiles_of_matrix`, padding included.

    Args:
        tiles: [R, T, 256] in stream order, any dtype.

    Returns:
        [R*64, T*4], C-contiguous, the dtype of `tiles`.

    Raises:
        ShapeError: `tiles` is not [R, T, 256].
    """
    if tiles.ndim != 3 or tiles.shape[2] != WEIGHTS_PER_TILE:
        raise ShapeError("tiles must have the shape [rows, columns, 256]", list(tiles.shape), "decode whole rows of tiles")
    rows, columns, _ = tiles.shape
    blocks = tiles.reshape(rows, columns, TILE_OUTPUTS, TILE_INPUTS).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocks).reshape(rows * TILE_OUTPUTS, columns * TILE_INPUTS)
