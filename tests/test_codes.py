"""The definitions: every code of split, every window of trellis, and the geometry of a tile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.codes import split, tile, trellis
from septet.errors import CodeRangeError, OptionError, ShapeError
from septet.packing import pack

WIDTHS = (6, 7, 8)


# ---- tile ----


def test_stream_order_of_every_weight() -> None:
    outputs, inputs = 130, 9
    matrix = np.arange(outputs * inputs).reshape(outputs, inputs) + 1
    tiles = tile.tiles_of_matrix(matrix)
    assert tiles.shape == (3, 3, 256) == (*tile.tile_grid(outputs, inputs), tile.WEIGHTS_PER_TILE)
    for n in range(192):
        for k in range(12):
            expected = matrix[n, k] if n < outputs and k < inputs else 0
            assert tiles[n // 64, k // 4, 4 * (n % 64) + k % 4] == expected


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 200), columns=st.integers(1, 40))
def test_matrix_of_tiles_undoes_tiles_of_matrix(rows: int, columns: int) -> None:
    matrix = np.random.default_rng(rows).integers(-127, 128, (rows, columns)).astype(np.int8)
    back = tile.matrix_of_tiles(tile.tiles_of_matrix(matrix))
    assert back.dtype == np.int8 and back.flags.c_contiguous
    np.testing.assert_array_equal(back[:rows, :columns], matrix)
    assert not back[rows:].any() and not back[:, columns:].any()


def test_tile_sizes() -> None:
    assert [tile.tile_bytes(bits) for bits in WIDTHS] == [96, 112, 128]
    for bits in (5, 9, 0, -7):
        with pytest.raises(OptionError, match="bits per pair must be 6, 7 or 8"):
            tile.tile_bytes(bits)
    with pytest.raises(ShapeError, match="at least one row"):
        tile.tile_grid(0, 4)
    with pytest.raises(ShapeError, match="256"):
        tile.matrix_of_tiles(np.zeros((1, 1, 255), np.int8))


# ---- split ----


def test_all_128_split_codes() -> None:
    fields = split.fields_of_symbols(np.arange(128, dtype=np.uint8))
    assert fields.dtype == np.uint8
    for symbol in range(128):
        assert (fields[2 * symbol], fields[2 * symbol + 1]) == (symbol % 16, symbol // 16)
    np.testing.assert_array_equal(split.symbols_of_fields(fields), np.arange(128))


def test_split_fields_keep_their_leading_axes() -> None:
    symbols = np.arange(6 * 128, dtype=np.int64).reshape(2, 3, 128) % 128
    fields = split.fields_of_symbols(symbols.astype(np.uint8))
    assert fields.shape == (2, 3, 256)
    np.testing.assert_array_equal(split.symbols_of_fields(fields), symbols)
    assert split.symbols_of_fields(fields[:0]).shape == (0, 3, 128)


@pytest.mark.parametrize("pair", [(16, 0), (0, 8), (-1, 0), (0, -1)])
def test_split_rejects_fields_out_of_range(pair: tuple[int, int]) -> None:
    with pytest.raises(CodeRangeError, match="-bit field must be in 0"):
        split.symbols_of_fields(np.array(pair))


def test_split_rejects_symbols_out_of_range() -> None:
    with pytest.raises(CodeRangeError, match="got 128"):
        split.fields_of_symbols(np.array([128], np.uint8))


def test_split_zero_points() -> None:
    np.testing.assert_array_equal(split.zero_points(5), [8, 4, 8, 4, 8])


# ---- trellis ----


@pytest.mark.parametrize("bits", WIDTHS)
def test_all_65536_windows(bits: int) -> None:
    width = trellis.WIDTHS[bits]
    levels = trellis.window_levels(bits).tolist()
    for window in range(1 << 16):
        hashed = (window * width.multiplier >> 16) & 0xFFFF
        assert levels[window] == [width.table[hashed % 128], width.table[hashed // 256 % 128]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_hash_in_16_bit_halves(bits: int) -> None:
    """What vectors compute: mulhi(w, C mod 2^16) + mullo(w, C >> 16)."""
    width = trellis.WIDTHS[bits]
    windows = np.arange(1 << 16, dtype=np.uint64)
    low, high = width.multiplier & 0xFFFF, width.multiplier >> 16
    halves = ((windows * np.uint64(low) >> np.uint64(16)) + (windows * np.uint64(high) & np.uint64(0xFFFF))) & np.uint64(0xFFFF)
    np.testing.assert_array_equal(trellis.hash_windows(windows, width), halves)


@pytest.mark.parametrize("bits", WIDTHS)
def test_tables_are_sign_and_magnitude(bits: int) -> None:
    width = trellis.WIDTHS[bits]
    magnitudes, negatives = width.table[:64], width.table[64:]
    assert width.bits_per_pair == bits and 0 < width.multiplier < 1 << 32
    assert len(width.table) == 128
    assert list(magnitudes) == sorted(magnitudes) and magnitudes[0] > 0 and magnitudes[-1] <= 127
    assert negatives == tuple(-level for level in magnitudes)
    assert width.table_array().dtype == np.int8


@pytest.mark.parametrize("bits", WIDTHS)
def test_windows_are_bits_of_the_packed_tile(bits: int, rng: np.random.Generator) -> None:
    symbols = rng.integers(0, 1 << bits, (1, 3, 128)).astype(np.uint8)
    windows = trellis.windows_of_symbols(symbols, bits)
    assert windows.dtype == np.uint16
    for index, data in enumerate(pack(symbols, bits).reshape(3, -1)):
        stream = int.from_bytes(data.tobytes(), "little")
        twice = stream | stream << 128 * bits
        for pair in range(128):
            assert windows[0, index, pair] == (twice >> bits * pair) & 0xFFFF


@pytest.mark.parametrize("bits", WIDTHS)
def test_decode_is_the_levels_of_the_windows(bits: int, rng: np.random.Generator) -> None:
    symbols = rng.integers(0, 1 << bits, (2, 2, 128)).astype(np.uint8)
    levels = trellis.decode(symbols, bits)
    assert levels.dtype == np.int8 and levels.shape == (2, 2, 256)
    windows = trellis.windows_of_symbols(symbols, bits)
    for pair in range(128):
        np.testing.assert_array_equal(levels[..., 2 * pair : 2 * pair + 2], trellis.window_levels(bits)[windows[..., pair]])


@pytest.mark.parametrize("bits", WIDTHS)
def test_turning_a_tile_turns_its_levels(bits: int, rng: np.random.Generator) -> None:
    symbols = rng.integers(0, 1 << bits, 128).astype(np.uint8)
    levels = trellis.decode(symbols, bits)
    for turn in (1, 5, 127):
        np.testing.assert_array_equal(trellis.decode(np.roll(symbols, turn), bits), np.roll(levels, 2 * turn))


def test_window_levels_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        trellis.window_levels(7)[0, 0] = 1


@pytest.mark.parametrize("bits", WIDTHS)
def test_to_fixed_counts_quarter_levels(bits: int) -> None:
    factor = np.float32(4 * trellis.WIDTHS[bits].levels_per_sigma)
    values = np.array([0, 1, -1, 100, -100, 0.37], np.float32)
    fixed = trellis.to_fixed(values, bits)
    assert fixed.dtype == np.int16
    np.testing.assert_array_equal(fixed[:3], [0, np.rint(factor), -np.rint(factor)])
    np.testing.assert_array_equal(fixed[3:5], [1020, -1020])
    assert fixed[5] == np.rint(np.float32(0.37) * factor)


def test_decode_rejects_bad_symbols() -> None:
    with pytest.raises(CodeRangeError, match="got 64"):
        trellis.decode(np.full(128, 64, np.uint8), 6)
    with pytest.raises(ShapeError, match="128 symbols"):
        trellis.decode(np.zeros((3, 127), np.uint8), 7)
    with pytest.raises(OptionError):
        trellis.decode(np.zeros(128, np.uint8), 5)
