"""Triton kernels: the trellis encoder, which is the exact search of `codes.trellis_search` with the same ties, ordered sums, rotations.

One program encodes one tile. A step looks at all 65536 windows, but only the costs of the 2^(16 - b) states are kept between steps. With
w = s << b | low the new state is s = c * groups + g, and the state before it g << b | low: so the costs are read as [groups, 2^b], and
spread over all c. Windows are worked off in chunks of c; each keeps the least (cost << 8 | low), so ties go to the lowest low. Costs and
survivors lie in global memory, where the caches hold them. What is subtracted from all costs after a step changes no decision; here it is
the cost of state 0.

Triton launches on the thread's current GPU, wherever tensors are, so each call makes theirs the current one. On a processor the kernels run
in Triton's interpreter, which the tests use.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl

from septet.codes import trellis
from septet.codes.tile import PAIRS_PER_TILE
from septet.codes.trellis_search import BOUNDARY_STEPS, FORBIDDEN_COST

__all__ = ["MOST_BLOCK_BYTES", "encode", "hadamard", "search", "sum_columns"]

#: Tiles that an H100 searches at the same time when each has a multiprocessor of its own. Then a program has many warps, otherwise few, and
#: several programs share a multiprocessor: (warps, windows that a program looks at together).
_FEW_TILES = 132
_FOR_FEW = 16, 16384
_FOR_MANY = 4, 4096
#: Tiles of one launch; survivors take 64 KB of each at 7 bits per pair.
_TILES_AT_ONCE = 4096
#: Of a Hadamard block, at most: what a program has in its registers, with as many neighbours as there is room for.
MOST_BLOCK_BYTES = 1 << 15


def encode(fixed: torch.Tensor, bits: int) -> torch.Tensor:
    """Encode tiles with the levels of the code.

    Args:
        fixed: int16 [tiles, 256] in stream order, quarter levels, -1020..1020, contiguous, on a GPU.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        int32 [tiles, 128], the window of each pair; its low bits are the symbol.
    """
    return search(fixed, _levels(bits, fixed.device), bits)


def search(fixed: torch.Tensor, levels: torch.Tensor, bits: int) -> torch.Tensor:
    """Encode tiles.

    Args:
        fixed: int16 [tiles, 256], as in `encode`.
        levels: int8 [2, 65536], first and second levels of each window.
        bits: bits per pair, 6, 7 or 8.

    Returns:
        int32 [tiles, 128], windows.
    """
    warps, chunk = _FOR_FEW if len(fixed) <= _FEW_TILES else _FOR_MANY
    states, count = 1 << (trellis.WINDOW_BITS - bits), len(fixed)
    windows = torch.empty((count, PAIRS_PER_TILE), dtype=torch.int32, device=fixed.device)
    most = min(count, _TILES_AT_ONCE)
    survivors = torch.empty((most, PAIRS_PER_TILE, states), dtype=torch.uint8, device=fixed.device)
    costs = torch.empty((most, 2, states), dtype=torch.int32, device=fixed.device)
    for start in range(0, count, _TILES_AT_ONCE):
        part = slice(start, start + _TILES_AT_ONCE)
        with torch.cuda.device_of(fixed):
            _search_tile[(len(fixed[part]),)](
                fixed[part],
                levels[0],
                levels[1],
                survivors,
                costs,
                windows[part],
                BITS=bits,
                CHUNK=chunk >> (trellis.WINDOW_BITS - bits),
                PAIRS=PAIRS_PER_TILE,
                AROUND=BOUNDARY_STEPS,
                FAR=FORBIDDEN_COST,
                num_warps=warps,
            )
    return windows


def sum_columns(values: torch.Tensor) -> torch.Tensor:
    """Sum over the first axis in index order: float64 [n, U], contiguous, on a GPU -> float64 [U]."""
    length, count = values.shape
    result = torch.empty(count, dtype=torch.float64, device=values.device)
    block = 64
    with torch.cuda.device_of(values):
        _add_in_order[(-(-count // block),)](values, result, length, count, BLOCK=block, num_warps=2)
    return result


def hadamard(matrix: torch.Tensor, block: int, along_outputs: bool, out: torch.Tensor) -> torch.Tensor:
    """Multiply by the block Hadamard matrix in one pass, with the bits of `rotation.hadamard`.

    Args:
        matrix: float32 or float64 [N, K], contiguous, on a GPU.
        block: a power of two, at least 2, that divides the side it goes along; of at most `MOST_BLOCK_BYTES` bytes.
        along_outputs: along N instead of K.
        out: like `matrix`, or itself.

    Returns:
        `out`.
    """
    outputs, inputs = matrix.shape
    others, groups = (inputs, outputs // block) if along_outputs else (outputs, inputs // block)
    steps = (1, inputs) if along_outputs else (inputs, 1)
    together = max(1, MOST_BLOCK_BYTES // (block * matrix.itemsize))
    scale, stages = 1 / math.sqrt(block), block.bit_length() - 1
    # One axis: a second one ends at 65535, which a vocabulary in blocks of two can pass.
    grid = (-(-others // together) * groups,)
    with torch.cuda.device_of(matrix):
        _hadamard_blocks[grid](matrix, out, others, *steps, BLOCK=block, STAGES=stages, TOGETHER=together, SCALE=scale, num_warps=8)
    return out


@cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    """The levels of all windows, int8 [2, 65536]."""
    return torch.from_numpy(np.ascontiguousarray(trellis.window_levels(bits).T)).to(device)


@triton.jit
def _forward(fixed, first, second, survivors, costs, begin, steps, BITS: tl.constexpr, CHUNK: tl.constexpr, PAIRS: tl.constexpr):
    """Steps of the search from pair `begin` on; costs begin in the first of the two buffers."""
    STATES: tl.constexpr = 1 << (16 - BITS)
    GROUPS: tl.constexpr = 1 << (16 - 2 * BITS)
    BRANCHES: tl.constexpr = 1 << BITS
    low = tl.arange(0, BRANCHES)
    before = tl.arange(0, GROUPS)[:, None] * BRANCHES + low[None, :]
    after = tl.arange(0, CHUNK)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    window = after[:, :, None] * BRANCHES + low[None, None, :]
    for step in range(steps):
        pair = (begin + step) % PAIRS
        x0 = tl.load(fixed + 2 * pair).to(tl.int32)
        x1 = tl.load(fixed + 2 * pair + 1).to(tl.int32)
        old = costs + (step % 2) * STATES
        new = costs + STATES - (step % 2) * STATES
        cost = ((tl.load(old + before) - tl.load(old)) << 8) + low[None, :]
        for c in range(0, BRANCHES, CHUNK):
            t0 = tl.load(first + c * (GROUPS * BRANCHES) + window).to(tl.int32)
            t1 = tl.load(second + c * (GROUPS * BRANCHES) + window).to(tl.int32)
            # 256 m = T0 (512 T0 - 256 X0) + T1 (512 T1 - 256 X1)
            reached = cost[None, :, :] + t0 * (512 * t0 - 256 * x0) + t1 * (512 * t1 - 256 * x1)
            best = tl.min(reached, axis=2)
            tl.store(new + c * GROUPS + after, best >> 8)
            tl.store(survivors + step * STATES + c * GROUPS + after, (best & 255).to(tl.uint8))
        tl.debug_barrier()


@triton.jit
def _search_tile(
    fixed,
    first,
    second,
    survivors,
    costs,
    windows,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    AROUND: tl.constexpr,
    FAR: tl.constexpr,
):
    """One tile: its boundary state, then its best path from that state to that state."""
    STATES: tl.constexpr = 1 << (16 - BITS)
    tile = tl.program_id(0).to(tl.int64)
    fixed += tile * 2 * PAIRS
    survivors += tile * PAIRS * STATES
    costs += tile * 2 * STATES
    windows += tile * PAIRS
    every = tl.arange(0, STATES)
    tl.store(costs + every, tl.zeros((STATES,), tl.int32))
    tl.debug_barrier()
    _forward(fixed, first, second, survivors, costs, PAIRS - AROUND, 2 * AROUND, BITS, CHUNK, PAIRS)
    # An even number of steps has ended in the first buffer.
    state = tl.argmin(tl.load(costs + every), axis=0)
    for back in range(AROUND):
        kept = tl.load(survivors + (2 * AROUND - 1 - back) * STATES + state).to(tl.int32)
        state = ((state << BITS) | kept) & (STATES - 1)
    tl.debug_barrier()
    tl.store(costs + every, tl.where(every == state, 0, FAR))
    tl.debug_barrier()
    _forward(fixed, first, second, survivors, costs, 0, PAIRS, BITS, CHUNK, PAIRS)
    for back in range(PAIRS):
        kept = tl.load(survivors + (PAIRS - 1 - back) * STATES + state).to(tl.int32)
        window = (state << BITS) | kept
        tl.store(windows + PAIRS - 1 - back, window)
        state = window & (STATES - 1)


@triton.jit
def _add_in_order(values, result, length, count, BLOCK: tl.constexpr):
    """The sums of a few columns, one row after the other."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    place = values + column
    for _ in range(length):
        total += tl.load(place, mask=column < count, other=0.0)
        place += count
    tl.store(result + column, total, mask=column < count)


@triton.jit
def _hadamard_blocks(
    matrix, out, others, other_step, step, BLOCK: tl.constexpr, STAGES: tl.constexpr, TOGETHER: tl.constexpr, SCALE: tl.constexpr
):
    """A Hadamard block of several neighbours: sums and differences at distances 1, 2, 4, ..., then one multiplication."""
    across = tl.cdiv(others, TOGETHER)
    other = (tl.program_id(0) % across).to(tl.int64) * TOGETHER + tl.arange(0, TOGETHER)
    along = (tl.program_id(0) // across).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = other[:, None] * other_step + along[None, :] * step
    there = other[:, None] < others
    values = tl.load(matrix + place, mask=there, other=0.0)
    for stage in tl.static_range(STAGES):
        pairs = tl.reshape(values, (TOGETHER, BLOCK >> (stage + 1), 2, 1 << stage))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        pairs = tl.permute(tl.join(first + second, first - second), (0, 1, 3, 2))
        values = tl.reshape(pairs, (TOGETHER, BLOCK))
    tl.store(out + place, values * tl.full((TOGETHER, BLOCK), SCALE, values.dtype), mask=there)
