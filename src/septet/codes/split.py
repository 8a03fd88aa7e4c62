"""The code "split": 7 bits are a 4-bit field and a 3-bit field, each with its own scale and offset.

symbol = q4 | q3 << 4. The first weight of the pair (even input) is q4 in 0..15, the second (odd input) is q3 in 0..7.
A weight is scale * q + offset; without stored offsets it is scale * (q - zero point), with zero points 8 and 4.
"""

from __future__ import annotations

import numpy as np

from septet.errors import CodeRangeError

__all__ = ["BITS_PER_PAIR", "FIELD_MAX", "FIRST_BITS", "ZERO_POINTS", "fields_of_symbols", "symbols_of_fields", "zero_points"]

BITS_PER_PAIR = 7
FIRST_BITS = 4
#: Largest value of the first and the second field.
FIELD_MAX = (15, 7)
#: What a symmetric code subtracts from the first and the second field.
ZERO_POINTS = (8, 4)


def fields_of_symbols(symbols: np.ndarray) -> np.ndarray:
    """Split symbols into their two fields.

    Args:
        symbols: uint8 [..., P], 0..127.

    Returns:
        uint8 [..., 2*P]: q4 at even positions, q3 at odd positions.

    Raises:
        CodeRangeError: a symbol is larger than 127.
    """
    symbols = np.asarray(symbols, np.uint8)
    if symbols.size and symbols.max() > 127:
        raise CodeRangeError("a symbol of the split code must be in 0..127", int(symbols.max()), "unpack with 7 bits per pair")
    pairs = np.stack([symbols & FIELD_MAX[0], symbols >> FIRST_BITS], axis=-1)
    return pairs.reshape(*symbols.shape[:-1], 2 * symbols.shape[-1])


def symbols_of_fields(fields: np.ndarray) -> np.ndarray:
    """Join fields into symbols; the inverse of `fields_of_symbols`.

    Args:
        fields: integers [..., 2*P]: 0..15 at even positions, 0..7 at odd positions.

    Returns:
        uint8 [..., P], 0..127.

    Raises:
        CodeRangeError: a field does not fit its bits.
    """
    fields = np.asarray(fields)
    pairs = fields.reshape(*fields.shape[:-1], fields.shape[-1] // 2, 2)
    for index, largest in enumerate(FIELD_MAX):
        field = pairs[..., index]
        if field.size and (field.min() < 0 or field.max() > largest):
            got = f"{field.min()}..{field.max()}"
            raise CodeRangeError(f"a {(4, 3)[index]}-bit field must be in 0..{largest}", got, "clip before joining the fields")
    pairs = pairs.astype(np.uint8)
    return pairs[..., 0] | pairs[..., 1] << FIRST_BITS


def zero_points(columns: int) -> np.ndarray:
    """Zero points of a symmetric matrix: int32 [columns], 8 at even and 4 at odd columns."""
    return np.where(np.arange(columns) % 2 == 0, *ZERO_POINTS).astype(np.int32)
