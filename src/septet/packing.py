"""Symbols <-> bytes: the bits of a tile are those of its 128 symbols, one after the other, lowest bit first.

Bit i of a tile is bit i % 8 of byte i // 8. Eight symbols of b bits are b whole bytes, so eight symbols are packed at a time
as one little-endian 64-bit number. Tiles of one row of tiles follow each other along the inputs.
"""

from __future__ import annotations

import numpy as np

from septet.codes.tile import PAIRS_PER_TILE, check_bits, tile_bytes
from septet.errors import CodeRangeError, ShapeError

__all__ = ["pack", "unpack"]

_GROUP = 8


def _shifts(bits: int) -> np.ndarray:
    """Where the eight symbols of a group start, in bits."""
    return np.arange(_GROUP, dtype="<u8") * np.uint64(bits)


def pack(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Pack symbols into bytes.

    Args:
        symbols: uint8 [R, T, 128], below 2^bits.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        uint8 [R, T*16*bits].

    Raises:
        CodeRangeError: a symbol is 2^bits or larger.
        ShapeError: `symbols` is not uint8 [R, T, 128].
    """
    check_bits(bits)
    if symbols.dtype != np.uint8 or symbols.ndim != 3 or symbols.shape[2] != PAIRS_PER_TILE:
        raise ShapeError("symbols must be uint8 [rows, columns, 128]", f"{symbols.dtype} {list(symbols.shape)}", "pack whole tiles")
    if symbols.size and int(symbols.max()) >> bits:
        raise CodeRangeError(f"a symbol must be in 0..{(1 << bits) - 1}", int(symbols.max()), f"encode with {bits} bits per pair")
    rows, columns, _ = symbols.shape
    groups = symbols.reshape(-1, _GROUP).astype("<u8") << _shifts(bits)
    words = np.bitwise_or.reduce(groups, axis=1)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(rows, columns * tile_bytes(bits))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Unpack bytes into symbols; the inverse of `pack`.

    Args:
        packed: uint8 [R, T*16*bits].
        bits: bits per pair, 6, 7 or 8.

    Returns:
        uint8 [R, T, 128], below 2^bits.

    Raises:
        ShapeError: `packed` is not uint8 [R, whole tiles].
    """
    size = tile_bytes(bits)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] % size:
        got = f"{packed.dtype} {list(packed.shape)}"
        raise ShapeError(f"packed weights must be uint8 [rows, columns * {size}]", got, "check the bits per pair of this tensor")
    words = np.zeros((packed.size // bits, 8), np.uint8)
    words[:, :bits] = packed.reshape(-1, bits)
    symbols = (words.view("<u8") >> _shifts(bits)) & np.uint64((1 << bits) - 1)
    return symbols.astype(np.uint8).reshape(packed.shape[0], packed.shape[1] // size, PAIRS_PER_TILE)
