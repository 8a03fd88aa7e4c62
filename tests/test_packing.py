"""Packing: every symbol in every slot, round trips both ways, and bytes worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.errors import CodeRangeError, OptionError, ShapeError
from septet.packing import pack, unpack

WIDTHS = (6, 7, 8)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("background", ["zeros", "ones"])
def test_every_symbol_in_every_slot(bits: int, background: str) -> None:
    largest = (1 << bits) - 1
    rest = 0 if background == "zeros" else largest
    everything = (1 << 128 * bits) - 1 if rest else 0
    for symbol in range(1 << bits):
        symbols = np.full((1, 128, 128), rest, np.uint8)
        symbols[0, np.arange(128), np.arange(128)] = symbol
        packed = pack(symbols, bits)
        for slot, data in enumerate(packed.reshape(128, 16 * bits)):
            expected = everything & ~(largest << bits * slot) | symbol << bits * slot
            assert int.from_bytes(data.tobytes(), "little") == expected
        np.testing.assert_array_equal(unpack(packed, bits), symbols)


@pytest.mark.parametrize(
    ("bits", "first_bytes"),
    [
        # 000000 100000 010000 110000 001000 101000 011000 111000, lowest bit first, cut into bytes
        (6, [0b01000000, 0b00100000, 0b00001100, 0b01000100, 0b01100001, 0b00011100]),
        (7, [0b10000000, 0b10000000, 0b01100000, 0b01000000, 0b00101000, 0b00011000, 0b00001110]),
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_golden_bytes(bits: int, first_bytes: list[int]) -> None:
    symbols = (np.arange(128) % 8).astype(np.uint8).reshape(1, 1, 128)
    np.testing.assert_array_equal(pack(symbols, bits), [first_bytes * 16])


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Bits per pair, rows and columns of tiles, and a seed."""
    return draw(st.sampled_from(WIDTHS)), draw(st.integers(0, 4)), draw(st.integers(0, 5)), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_unpack_undoes_pack(case: tuple[int, int, int, int]) -> None:
    bits, rows, columns, seed = case
    symbols = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns, 128)).astype(np.uint8)
    packed = pack(symbols, bits)
    assert packed.dtype == np.uint8 and packed.flags.c_contiguous and packed.shape == (rows, columns * 16 * bits)
    np.testing.assert_array_equal(unpack(packed, bits), symbols)


@settings(max_examples=60, deadline=None)
@given(sizes())
def test_pack_undoes_unpack(case: tuple[int, int, int, int]) -> None:
    """Every string of bytes is some tile: the format has no invalid bytes."""
    bits, rows, columns, seed = case
    packed = np.random.default_rng(seed).integers(0, 256, (rows, columns * 16 * bits)).astype(np.uint8)
    symbols = unpack(packed, bits)
    assert symbols.dtype == np.uint8 and symbols.flags.c_contiguous and symbols.shape == (rows, columns, 128)
    np.testing.assert_array_equal(pack(symbols, bits), packed)


def test_tiles_follow_each_other_along_the_inputs() -> None:
    symbols = np.zeros((2, 3, 128), np.uint8)
    symbols[1, 2] = 127
    packed = pack(symbols, 7)
    assert (packed[1, 2 * 112 :] == 255).all() and packed[0].sum() == packed[1, : 2 * 112].sum() == 0


@pytest.mark.parametrize("bits", [6, 7])
def test_pack_rejects_symbols_out_of_range(bits: int) -> None:
    symbols = np.zeros((1, 1, 128), np.uint8)
    symbols[0, 0, 17] = 1 << bits
    with pytest.raises(CodeRangeError, match=f"got {1 << bits};"):
        pack(symbols, bits)


@pytest.mark.parametrize("bits", [0, 5, 9, 64])
def test_unknown_widths_are_rejected(bits: int) -> None:
    with pytest.raises(OptionError, match="6, 7 or 8"):
        pack(np.zeros((1, 1, 128), np.uint8), bits)
    with pytest.raises(OptionError, match="6, 7 or 8"):
        unpack(np.zeros((1, 16 * bits), np.uint8), bits)


@pytest.mark.parametrize("array", [np.zeros((1, 128), np.uint8), np.zeros((1, 1, 127), np.uint8), np.zeros((1, 1, 128), np.int64)])
def test_pack_rejects_other_shapes(array: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="symbols must be uint8"):
        pack(array, 7)


@pytest.mark.parametrize("array", [np.zeros(112, np.uint8), np.zeros((1, 111), np.uint8), np.zeros((1, 112), np.int8)])
def test_unpack_rejects_other_shapes(array: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="columns \\* 112"):
        unpack(array, 7)
