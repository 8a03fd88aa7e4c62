"""The encoder in clusters on a processor: its source against the definition, whatever the order in which threads run and costs arrive."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

from needs import program
from septet.codes import trellis, trellis_search
from septet.quantize_gpu import clusters

COMPILER = program("g++", "clang++", "c++")
#: More than any of the cases takes; each thread runs once a turn.
TURNS = 200_000


class _Arguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("fixed", "levels", "windows", "meetings")), ("tiles", ctypes.c_int)]


def emulated(folder: Path, bits: int, tiles: int, ends: int) -> ctypes.CDLL:
    """The kernel as a library, with a machine of its own in place of exchange.cu."""
    source, kernels = clusters.source_of(bits, tiles, ends), Path(clusters.__file__).parent
    for there, here in (
        ((kernels / "exchange.cu").read_text(), (Path(__file__).parent / "emulated_gpu.h").read_text()),
        ("extern __shared__ __align__(16) u8 memory[];", "u8* const memory = own_memory();"),
    ):
        assert source.count(there) == 1
        source = source.replace(there, here)
    assert "asm" not in source
    (folder / "encode.cpp").write_text(source)
    command = [COMPILER, "-std=c++17", "-O2", "-w", "-fwrapv", "-fno-strict-aliasing", "-shared", "-fPIC", "-o", "encode.so", "encode.cpp"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "encode.so"))


@pytest.mark.parametrize(
    ("bits", "tiles", "ends", "count"),
    [
        (7, 1, 2, 2),
        (7, 2, 2, 3),
        (7, 8, 2, 7),
        (7, 1, 1, 1),
        (7, 4, 1, 3),
        (6, 1, 2, 1),
        (6, 4, 2, 3),
        (8, 1, 2, 1),
        (8, 8, 2, 8),
        (8, 2, 1, 3),
    ],
)
def test_the_encoder_in_clusters_is_exact(bits: int, tiles: int, ends: int, count: int, tmp_path: Path) -> None:
    assert COMPILER is not None, "a C++ compiler must be on the path: make test installs one"
    library, rng = emulated(tmp_path, bits, tiles, ends), np.random.default_rng(bits * 100 + tiles * 10 + ends)
    fixed = np.clip(rng.standard_normal((count, 256)) * 300, -1020, 1020).astype(np.int16)
    # The largest weights there are, and none at all.
    fixed[-1] = np.where(np.arange(256) % 3, 1020, -1020)
    fixed[0, 100:200] = 0
    levels = clusters._levels_both_ways(bits, "cpu") if ends == 2 else clusters.window_levels(bits, "cpu")
    levels = np.ascontiguousarray(levels.numpy())
    symbols = trellis_search.search_from_both_ends(fixed, trellis.window_levels(bits), bits) if ends == 2 else trellis.encode(fixed, bits)
    windows = np.full((count, 128), -1, np.int32)
    meetings = np.full((count, 2, 2, 1 << trellis.WINDOW_BITS - bits), clusters._EMPTY, np.int32)
    arguments = _Arguments(fixed.ctypes.data, levels.ctypes.data, windows.ctypes.data, meetings.ctypes.data, count)
    blocks = clusters.PARTS * ends * -(-count // tiles)
    ended = library.run_grid(arguments, blocks, clusters._shared_bytes(bits, tiles, ends), ctypes.c_uint(tiles), ctypes.c_long(TURNS))
    assert ended
    assert np.array_equal(windows, trellis.windows_of_symbols(symbols, bits))
    assert (meetings == clusters._EMPTY).all()
