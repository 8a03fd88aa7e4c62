"""The code "trellis": the levels of a pair depend on a window of 16 bits of its tile's stream.

Symbol p of a tile is bits [b*p, b*p + b) of its stream, b = bits per pair. The window of pair p is the bits [b*p, b*p + 16),
modulo 128*b: the stream bites its tail. A hash and two looks into one table turn a window into two levels:

    h = (w*C >> 16) & 0xFFFF        levels = T[h & 127], T[(h >> 8) & 127]

So a symbol is the low b bits of its own window, and the windows of neighbours overlap in 16 - b bits:
w[p+1] = w[p] >> b | new bits << (16 - b). Multiplier C, table T and the scale of the encoder's input are chosen per width.
`trellis_search` finds the stream that comes closest to given weights.

Reference: bitshift trellis codes after Tseng et al. 2024 (QTIP, arXiv 2406.11235); tail-biting after Ma and Wolf 1986.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from septet.codes.tile import PAIRS_PER_TILE, check_bits
from septet.codes.trellis_search import search
from septet.errors import CodeRangeError, ShapeError

__all__ = [
    "FIXED_LIMIT",
    "FIXED_PER_LEVEL",
    "LEVEL_TABLE",
    "WIDTHS",
    "WINDOW_BITS",
    "TrellisWidth",
    "decode",
    "encode",
    "hash_windows",
    "to_fixed",
    "window_levels",
    "windows_of_symbols",
]

WINDOW_BITS = 16
WINDOW_MASK = 0xFFFF
TABLE_SIZE = 128
#: The encoder's input counts quarter levels.
FIXED_PER_LEVEL = 4
#: Inputs of the encoder are clipped here, a little above four times the largest level.
FIXED_LIMIT = 1020


@dataclass(frozen=True)
class TrellisWidth:
    """What differs between 6, 7 and 8 bits per pair.

    Args:
        bits_per_pair: 6, 7 or 8.
        multiplier: C of the hash, uint32.
        table: T, 128 levels in -127..127; T[64 + i] = -T[i].
        levels_per_sigma: level units that one standard deviation of Gaussian weights is encoded as, where the error is least.
    """

    bits_per_pair: int
    multiplier: int
    table: tuple[int, ...]
    levels_per_sigma: float

    def table_array(self) -> np.ndarray:
        """T as int8 [128]."""
        return np.array(self.table, np.int8)


# Multipliers: the best of some ten thousand random ones per width. Magnitudes: centroids of the encoder's own choices on Gaussian
# weights at 7 bits; retraining them for 6 or 8 bits gains nothing (tools/search_trellis.py; figures in docs/log.md).
# fmt: off
_MAGNITUDES = (
    1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10, 11, 12, 13, 14,
    15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 31,
    32, 32, 33, 35, 36, 37, 39, 39, 41, 42, 43, 45, 46, 48, 49, 50,
    53, 54, 56, 58, 60, 62, 65, 67, 70, 74, 77, 82, 87, 93, 105, 127,
)
# fmt: on


#: T, one for all widths. Index bit 6 is the sign, so that 64 entries and a sign are all a vector unit needs.
LEVEL_TABLE = _MAGNITUDES + tuple(-level for level in _MAGNITUDES)

WIDTHS = {
    6: TrellisWidth(6, 0x273EF68E, LEVEL_TABLE, 41.84),
    7: TrellisWidth(7, 0x658981FC, LEVEL_TABLE, 40.31),
    8: TrellisWidth(8, 0x846EC730, LEVEL_TABLE, 38.69),
}


def hash_windows(windows: np.ndarray, width: TrellisWidth) -> np.ndarray:
    """Hash windows: bits 16..31 of the product with the multiplier.

    Sixteen-bit vectors get there with mulhi(w, C mod 2^16) + mullo(w, C >> 16), a GPU with one 32-bit product.

    Args:
        windows: integers 0..65535, any shape.
        width: the multiplier to use.

    Returns:
        uint16, the shape of `windows`.
    """
    product = np.asarray(windows).astype(np.uint32) * np.uint32(width.multiplier)
    return (product >> np.uint32(WINDOW_BITS)).astype(np.uint16)


def _levels_of_all_windows(width: TrellisWidth) -> np.ndarray:
    """Levels int8 [65536, 2] of a width that need not be one of `WIDTHS`."""
    hashed = hash_windows(np.arange(1 << WINDOW_BITS), width)
    table = width.table_array()
    return np.stack([table[hashed & (TABLE_SIZE - 1)], table[(hashed >> 8) & (TABLE_SIZE - 1)]], axis=1)


@cache
def window_levels(bits: int) -> np.ndarray:
    """The two levels of each window.

    Args:
        bits: bits per pair, 6, 7 or 8.

    Returns:
        int8 [65536, 2], read-only, -127..127.
    """
    check_bits(bits)
    levels = _levels_of_all_windows(WIDTHS[bits])
    levels.setflags(write=False)
    return levels


def windows_of_symbols(symbols: np.ndarray, bits: int) -> np.ndarray:
    """The window of each pair: its own symbol in the low bits, then the bits of the pairs after it, around the tile's end.

    Args:
        symbols: uint8 [..., 128], below 2^bits.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        uint16 [..., 128].

    Raises:
        CodeRangeError: a symbol is 2^bits or larger.
        ShapeError: the last axis is not 128 symbols long.
    """
    check_bits(bits)
    symbols = np.asarray(symbols, np.uint8)
    if symbols.ndim == 0 or symbols.shape[-1] != PAIRS_PER_TILE:
        raise ShapeError("a tile must have 128 symbols", list(symbols.shape), "decode whole tiles")
    if symbols.size and int(symbols.max()) >> bits:
        raise CodeRangeError(f"a symbol must be in 0..{(1 << bits) - 1}", int(symbols.max()), f"unpack with {bits} bits per pair")
    wide = symbols.astype(np.uint32)
    windows = wide.copy()
    for distance in range(1, -(-WINDOW_BITS // bits)):
        windows |= np.roll(wide, -distance, axis=-1) << np.uint32(bits * distance)
    return (windows & np.uint32(WINDOW_MASK)).astype(np.uint16)


def decode(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Levels of whole tiles.

    Args:
        symbols: uint8 [..., 128], below 2^bits.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        int8 [..., 256] in stream order: pair p gives positions 2*p and 2*p + 1; -127..127.

    Raises:
        CodeRangeError, ShapeError: as `windows_of_symbols`.
    """
    windows = windows_of_symbols(symbols, bits)
    return window_levels(bits)[windows].reshape(*windows.shape[:-1], 2 * PAIRS_PER_TILE)


def to_fixed(values: np.ndarray, bits: int) -> np.ndarray:
    """Round weights to the encoder's input.

    Args:
        values: float32, any shape, finite, in standard deviations.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        int16, the shape of `values`: rint(values * float32(4 * levels_per_sigma)), half to even, clipped to -1020..1020.
    """
    check_bits(bits)
    factor = np.float32(FIXED_PER_LEVEL * WIDTHS[bits].levels_per_sigma)
    fixed = np.rint(np.asarray(values, np.float32) * factor)
    return np.clip(fixed, -FIXED_LIMIT, FIXED_LIMIT).astype(np.int16)


def encode(fixed: np.ndarray, bits: int) -> np.ndarray:
    """The stream whose levels come closest to the weights; exactly defined in `trellis_search`.

    Args:
        fixed: int16 [tiles, 256] in stream order, in quarter levels, -1020..1020.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        uint8 [tiles, 128], below 2^bits.

    Raises:
        CodeRangeError: a value lies outside -1020..1020.
        ShapeError: `fixed` is not [tiles, 256].
    """
    fixed = np.asarray(fixed)
    if fixed.ndim != 2 or fixed.shape[1] != 2 * PAIRS_PER_TILE:
        raise ShapeError("the encoder needs whole tiles, [tiles, 256]", list(fixed.shape), "cut the matrix with tiles_of_matrix")
    if fixed.size and max(int(fixed.max()), -int(fixed.min())) > FIXED_LIMIT:
        got = f"{fixed.min()}..{fixed.max()}"
        raise CodeRangeError(f"the encoder's input must be in -{FIXED_LIMIT}..{FIXED_LIMIT}", got, "use to_fixed, which clips")
    return search(fixed, window_levels(bits), bits)
