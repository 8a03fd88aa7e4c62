"""SPEC.md says what the code does: its constants, tables and worked bytes are read out of the text and computed anew."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from septet import packing
from septet.codes import split, trellis
from septet.codes.tile import PAIRS_PER_TILE, tile_bytes

SPEC = (Path(__file__).parent.parent / "SPEC.md").read_text()


def rows(pattern: str) -> list[tuple[str, ...]]:
    """The groups of every table row that looks like `pattern`."""
    found = [match.groups() for match in re.finditer(rf"^\| *{pattern} *\|$", SPEC, flags=re.MULTILINE)]
    assert found, f"SPEC.md has no row like {pattern}"
    return found


def test_multipliers_are_those_of_the_code() -> None:
    stated = {int(bits): int(multiplier, 16) for bits, multiplier in rows(r"([678]) \| `(0x[0-9A-F]{8})` \|.*")}
    assert stated == {bits: width.multiplier for bits, width in trellis.WIDTHS.items()}


def test_level_table_is_that_of_the_code() -> None:
    block = SPEC.split("<!-- level table")[1].split("```")[1]
    half = [int(number) for number in block.split()]
    assert len(half) == 64
    assert tuple(half + [-level for level in half]) == trellis.LEVEL_TABLE
    assert all(width.table == trellis.LEVEL_TABLE for width in trellis.WIDTHS.values())


def test_worked_bytes_of_split() -> None:
    stated = bytes(int(value, 16) for value in re.findall(r"byte [01] = .*?(0x[0-9A-F]{2})`", SPEC.split("## 8.")[1].split("`trellis`")[0]))
    fields = np.zeros((1, 1, 2 * PAIRS_PER_TILE), np.uint8)
    fields[0, 0, :4] = 5, 3, 15, 7
    packed = packing.pack(split.symbols_of_fields(fields), split.BITS_PER_PAIR)
    assert len(stated) == 2
    assert packed[0, :2].tobytes() == stated


def test_worked_bytes_of_trellis() -> None:
    tile = np.arange(tile_bytes(7), dtype=np.uint8)[None]
    symbols = packing.unpack(tile, 7)
    windows, levels = trellis.windows_of_symbols(symbols, 7).reshape(-1), trellis.decode(symbols, 7).reshape(-1)
    hashed = trellis.hash_windows(windows, trellis.WIDTHS[7])
    for pair, window, hash_, low, high, first, second in rows(
        r"(\d+) \| [^|]+ \| `(0x[0-9A-F]{4})` \| `(0x[0-9A-F]{4})` \| (\d+), (\d+) \| (-?\d+), (-?\d+)"
    ):
        p = int(pair)
        assert (windows[p], hashed[p]) == (int(window, 16), int(hash_, 16))
        assert (hashed[p] & 127, hashed[p] >> 8 & 127) == (int(low), int(high))
        assert (levels[2 * p], levels[2 * p + 1]) == (int(first), int(second))
