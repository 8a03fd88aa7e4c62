"""The encoder in CUDA C++, for GPUs whose blocks can work in clusters: a tile is searched by several multiprocessors at once.

`kernels` searches a tile on one multiprocessor. Error feedback asks for few tiles at a time, 64 for a matrix of 4096 outputs, so most of a
GPU would wait. Here blocks of a cluster share a tile, and keep its windows in registers; and from both ends two clusters search it in half
the time. Compiled where it runs, see `gpu.driver`.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch

from septet.codes.tile import PAIRS_PER_TILE
from septet.codes.trellis import WINDOW_BITS
from septet.codes.trellis_search import BOUNDARY_STEPS, FORBIDDEN_COST, reversed_windows
from septet.gpu.compiled import options_of, processors_of
from septet.gpu.driver import Kernel, compile_source, load_kernel, obstacle, shared_memory
from septet.quantize_gpu.rotation import window_levels

__all__ = ["encode", "encode_from_both_ends", "fits", "make_ready", "source_of"]

#: Blocks of a cluster, and threads of a block by bits per pair. A GPU has registers for 256 with 128 windows each, or for twice as many
#: with half as many windows: fewer threads shuffle and wait less, but with 6 bits a state does not have windows for enough of them.
PARTS = 2
THREADS = {6: 512, 7: 256, 8: 256}
#: States that a thread has windows of.
SIDE = 4
#: How many tiles a cluster may search together, by bits per pair; from one end, and from both.
MOST_TILES = {1: {6: 2, 7: 4, 8: 4}, 2: {6: 4, 7: 8, 8: 8}}
#: What a search takes beside its tiles, in times that it takes for each of them: measured with the encoder before (docs/log.md). With this
#: one it is a third for 7 bits from both ends, which would choose otherwise from 1,057 tiles on.
_START = 0.6
_EMPTY = -(1 << 31)
_POINTERS = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)


def fits(device: int) -> bool:
    """Whether a GPU can run this encoder: compute capability 9 and later."""
    from septet.gpu.layers import GPU_VARIABLE

    if os.environ.get(GPU_VARIABLE) == "triton" or obstacle() or torch.cuda.get_device_capability(device)[0] < 9:
        return False
    needed = [_shared_bytes(bits, tiles, ends) for ends, most in MOST_TILES.items() for bits, tiles in most.items()]
    return shared_memory(device) >= max(needed)


def encode(fixed: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Encode tiles; arguments and result are those of `kernels.encode`. The GPU must be the current one.

    Args:
        fixed: int16 [tiles, 256], contiguous.
        bits: bits per pair.
        out: int32 [tiles, 128], where to put the windows; None: a new tensor.
    """
    return _launch(fixed, bits, out, 1)


def encode_from_both_ends(fixed: torch.Tensor, bits: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """As `encode`, by `codes.trellis_search.search_from_both_ends`: a path of the same cost, in half the time when tiles are few.

    One call at a time on a GPU.
    """
    return _launch(fixed, bits, out, 2)


def make_ready(count: int, bits: int, device: torch.device) -> None:
    """Make and keep what `encode_from_both_ends` needs for so many tiles, as its first call would."""
    _kernel_for(device.index, count, bits, 2)
    _levels_both_ways(bits, str(device))
    _meetings(str(device), bits, count)


def _launch(fixed: torch.Tensor, bits: int, out: torch.Tensor | None, ends: int) -> torch.Tensor:
    """`encode` from one end of each tile, or from both."""
    device, count = fixed.device.index, len(fixed)
    kernel, tiles = _kernel_for(device, count, bits, ends)
    windows = torch.empty((count, PAIRS_PER_TILE), dtype=torch.int32, device=fixed.device) if out is None else out
    levels = window_levels(bits, str(fixed.device)) if ends == 1 else _levels_both_ways(bits, str(fixed.device))
    meetings = None if ends == 1 else _meetings(str(fixed.device), bits, count).data_ptr()
    arguments = fixed.data_ptr(), levels.data_ptr(), windows.data_ptr(), meetings, count
    grid = PARTS * ends * -(-count // tiles), 1
    kernel.launch(grid, torch.cuda.current_stream(device).cuda_stream, *arguments)
    return windows


def _kernel_for(device: int, count: int, bits: int, ends: int) -> tuple[Kernel, int]:
    """The variant that takes least for so many tiles, and how many of them it searches together."""
    tiles = _tiles_together(count, processors_of(device) // (PARTS * ends), MOST_TILES[ends][bits])
    return _kernel(device, bits, tiles, ends), tiles


def _tiles_together(count: int, places: int, most: int) -> int:
    """With how many tiles each `count` tiles take least, when so many places work at the same time."""

    def time(tiles: int) -> float:
        return -(-count // (tiles * places)) * (_START + tiles)

    return min(range(1, most + 1), key=time)


@cache
def _levels_both_ways(bits: int, device: str) -> torch.Tensor:
    """Levels of each window and of each that is read backward, int8 [2, 65536, 2]."""
    levels = window_levels(bits, device)
    return torch.stack([levels, levels[torch.from_numpy(reversed_windows(len(levels))).to(device)]])


@cache
def _meetings(device: str, bits: int, count: int) -> torch.Tensor:
    """Where the two clusters of each of `count` tiles leave costs for each other, int32 [count, 2, 2, states]; empty between calls."""
    return torch.full((count, 2, 2, 1 << WINDOW_BITS - bits), _EMPTY, dtype=torch.int32, device=device)


def source_of(bits: int, tiles: int, ends: int) -> str:
    """The source of a variant."""
    macros = {"BITS": bits, "PARTS": PARTS, "THREADS": THREADS[bits], "SIDE": SIDE, "TILES": tiles, "ENDS": ends}
    macros |= {"AROUND": BOUNDARY_STEPS, "FORBIDDEN": FORBIDDEN_COST}
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    files = [(Path(__file__).parent / name).read_text() for name in ("exchange.cu", "states.cu", "encode.cu")]
    return "\n".join([*lines, *files])


@cache
def _kernel(device: int, bits: int, tiles: int, ends: int) -> Kernel:
    image = compile_source(source_of(bits, tiles, ends), options_of(device))
    return load_kernel(image, "encode", _POINTERS, THREADS[bits], _shared_bytes(bits, tiles, ends))


def _shared_bytes(bits: int, tiles: int, ends: int) -> int:
    """Costs of three steps, weights, a boundary and a least cost of each tile, what warps find, and survivors of tiles to trace back."""
    states = 1 << WINDOW_BITS - bits
    each = 4 * (3 * states + PAIRS_PER_TILE + 2)
    return tiles * each + THREADS[bits] // 32 * 8 + -(-tiles // PARTS) * PAIRS_PER_TILE // ends * states
