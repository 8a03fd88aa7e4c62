"""How a whole layer in one launch is divided among blocks of threads, and which variant of layer.cu runs it.

A column is what 64 inputs have to do with 256 outputs: four units, the rows of a group, which is finished by one block. Blocks take columns
one after the other, so that each has a short range of inputs.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from septet.gpu import compiled
from septet.gpu.compiled import LayerKind
from septet.gpu.layout import units_of

__all__ = ["CHUNK", "GROUP_ROWS", "OWN_INPUTS", "Shares", "blocks_of", "even_shares", "plan", "shares"]

#: Hadamard blocks up to this size, in sizes of multiples of eight, are rotated by a warp.
CHUNK = 256
#: Inputs with one scale that every block of threads rotates to find it; more are rotated once before.
OWN_INPUTS = 8192
#: Rows of 64 outputs that are finished together.
GROUP_ROWS = 4
#: Units on a multiprocessor up to which layers are small.
_SMALL_UNITS = 64
#: How much later than others, in columns of a block, one begins where a group of outputs was finished; measured on an H100.
_LATE = 4


class Shares(NamedTuple):
    """How columns, 4 x 64 outputs and 64 inputs, are divided among blocks of threads, one after the other.

    Args:
        each: columns of a block.
        more: first blocks that have one more.
        late: from this block on
        less: a block has so many less.
    """

    each: int
    more: int
    late: int
    less: int

    @property
    def most(self) -> int:
        """Columns of the largest block."""
        return self.each + (self.more > 0)


def even_shares(columns: int, blocks: int) -> Shares:
    """Shares that differ by at most one column."""
    return Shares(*divmod(columns, blocks), blocks, 0)


def shares(columns: int, groups: int, blocks: int, limit: int) -> Shares:
    """Divide columns so that all blocks end at about the same time.

    Blocks begin in order. Where the launch before finished a group of outputs, a block begins late, by the time of `_LATE` columns; so the
    last blocks, one for each group, get less.

    Args:
        columns: at least one for each block.
        groups: of 256 outputs.
        blocks: of threads, all of which run at the same time.
        limit: what a block should not exceed, unless even shares do.
    """
    even = even_shares(columns, blocks)
    if 2 * groups > blocks:
        return even
    late = blocks - groups
    candidates = [Shares(*divmod(columns + groups * less, blocks), late, less) for less in range(_LATE + 1)]
    possible = [share for share in candidates if share.more <= late and share.each > share.less and share.most <= limit]
    return min(possible, key=lambda share: max(share.most, share.each - share.less + _LATE), default=even)


@cache
def plan(tokens: int, inputs: int, outputs: int, device: int) -> tuple[LayerKind, int, Shares] | None:
    """How `launches.whole_layer` runs: kind, blocks of threads and their shares. None where shared memory is too small."""
    units, rows = units_of(inputs), -(-outputs // 64)
    groups, small = -(-rows // GROUP_ROWS), units * rows <= _SMALL_UNITS * compiled.processors_of(device)
    columns = groups * units
    blocks = blocks_of(device, columns)
    if (columns + units) * units >= 1 << 32:
        return None
    limit = compiled.SMALLEST.units // GROUP_ROWS
    if tokens == 1 and inputs <= OWN_INPUTS and columns <= limit * blocks:
        share = shares(columns, groups, blocks, limit)
        if _decodes_all(units, share.most):
            return compiled.SMALLEST, blocks, share
    # where two blocks fit on a multiprocessor, half decoded is early enough for all of them
    if small and _fits(compiled.SMALL, tokens, units, share := even_shares(columns, blocks)):
        return compiled.SMALL, blocks, share
    share = shares(columns, groups, blocks, columns)
    return (compiled.LARGE, blocks, share) if _fits(compiled.LARGE, tokens, units, share) else None


def _fits(kind: LayerKind, tokens: int, units: int, share: Shares) -> bool:
    """Whether shared memory has room."""
    pieces = share.most // units + 2
    # partial sums, two buffers, three words for each row
    sums = (kind.warps + GROUP_ROWS * pieces) * tokens * 256 + kind.warps * 256 + GROUP_ROWS * pieces * 12
    # how each thread ends, where a block fills a multiprocessor
    ends = kind.warps * 32 * 16 if kind.blocks == 1 else 0
    # int8 inputs, a float32 scale for 64 of them, and a word per warp
    return sums + ends + tokens * units * (64 + 4) + 4 * kind.warps <= kind.room


def _decodes_all(units: int, most: int) -> bool:
    """Whether blocks with at most so many columns can keep them decoded: `compiled.SMALLEST`."""
    kind = compiled.SMALLEST
    # inputs of whole chunks, a scale for each unit of them, and a word per warp
    chunks = min(units // GROUP_ROWS, (most + 2) // GROUP_ROWS + 1)
    fits = chunks * (CHUNK + 4 * GROUP_ROWS) + 4 * kind.warps <= kind.room
    return fits and units % GROUP_ROWS == 0 and most * GROUP_ROWS <= kind.units


def blocks_of(device: int, columns: int) -> int:
    """Blocks of threads: one for each multiprocessor, if there is a column for it."""
    return min(compiled.processors_of(device), columns)
