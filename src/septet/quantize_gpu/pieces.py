"""The rows of a fused group in pieces, on one GPU.

Pieces do not depend on how many GPUs there are, and no errors pass from one to another. A GPU takes neighbours together where every number
is worked on by itself, since small kernels take longer to send than to run; products and sums keep to pieces, so their bits do, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from septet.codes.tile import TILE_OUTPUTS
from septet.quantize import rotation
from septet.quantize.statistics import output_rows

__all__ = ["Coded", "Piece", "Strip", "pieces_of", "strips_of"]

#: Rows whose outputs do not know each other are worked off in pieces of about this many weights, and pieces are taken together up to it.
_PIECE_WEIGHTS = 1 << 25


@dataclass(frozen=True, eq=False)
class Piece:
    """Neighbouring rows of one tensor, and what is known of their outputs; no errors pass from one piece to another."""

    tensor: int
    rows: slice
    sensitivity: np.ndarray | None

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(eq=False)
class Strip:
    """Pieces that follow each other in one tensor, on the GPU that works on them.

    Args:
        pieces: at least one.
        weights: float32 [n, K].
        rotated: in standard deviations, float32 [n, K].
        scale: rounded, that `rotated` belongs to, float16 [n].
    """

    pieces: list[Piece]
    weights: torch.Tensor
    rotated: torch.Tensor
    scale: np.ndarray

    def parts(self) -> Iterator[slice]:
        """Where its pieces are in it."""
        first = self.pieces[0].rows.start
        return (slice(piece.rows.start - first, piece.rows.stop - first) for piece in self.pieces)


@dataclass(frozen=True, eq=False)
class Coded:
    """What becomes of a strip.

    Args:
        tensor: which one it is of.
        scale: float16 [n].
        squares: of each piece the sum of the squares of its errors, and that of its weights: [pieces, 2].
        decoded: float32 [n, K], on the GPU that worked on it; None: nobody wants it.
    """

    tensor: int
    scale: np.ndarray
    squares: list[list[float]]
    decoded: torch.Tensor | None


def pieces_of(tensor: int, shape: tuple[int, int], sensitivity: np.ndarray | None, output_block: int) -> list[Piece]:
    """Rows whose outputs know each other, in pieces of their own; the same cut as in `quantize.trellis`. It is the same on any GPUs."""
    step, block = output_rows(shape[0]), max(TILE_OUTPUTS, output_block)
    if sensitivity is None or (step % block and step != shape[0]):
        return [Piece(tensor, slice(*cut), None) for cut in rotation.row_pieces(shape, block, _PIECE_WEIGHTS)]
    return [Piece(tensor, slice(start, start + step), sensitivity[start // step]) for start in range(0, shape[0], step)]


def strips_of(pieces: list[Piece], inputs: int) -> list[list[Piece]]:
    """Pieces of a share, in order, those taken together that follow each other in one tensor."""
    strips: list[list[Piece]] = []
    for piece in pieces:
        last = strips[-1] if strips else []
        follows = bool(last) and last[-1].tensor == piece.tensor and last[-1].rows.stop == piece.rows.start
        if follows and (sum(map(len, last)) + len(piece)) * inputs <= _PIECE_WEIGHTS:
            last.append(piece)
        else:
            strips.append([piece])
    return strips
