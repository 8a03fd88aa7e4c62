"""Pieces of the rows of a fused group on one GPU: rotated, encoded, their scales fitted again.

Pieces do not depend on how many GPUs there are, and no errors pass from one to another. Until a piece is encoded nothing waits for the GPU
while there is work to send: many of its kernels are small.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import torch

from septet.codes import trellis as trellis_code
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS
from septet.quantize import rotation, scales
from septet.quantize.refit import better_scales
from septet.quantize.statistics import output_rows
from septet.quantize_gpu import sums
from septet.quantize_gpu.factorization import Factor
from septet.quantize_gpu.feedback import Encoder, Sheet, encode_plainly, encode_sheets
from septet.quantize_gpu.outputs import OutputFactors
from septet.quantize_gpu.rotation import hadamard, rotate, unrotate
from septet.quantize_gpu.statistics import InputMetric

__all__ = ["Coded", "Piece", "Prepared", "Settings", "Work", "pieces_of"]

#: Rows whose outputs do not know each other are worked off in pieces of about this many weights.
_PIECE_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Args:
        bits_per_pair: 6, 7 or 8.
        rotation_block: the largest Hadamard block, a power of two.
        seed: of the random signs.
        device: "cuda", "cuda:1", ...; "cpu" works with an encoder of one's own.
        encoder: of tiles; None: the quickest that the GPU can run.
        helpers: more devices of the same kind that share the work; bytes do not depend on how many.
    """

    bits_per_pair: int = 7
    rotation_block: int = 256
    seed: int = 0
    device: str = "cuda"
    encoder: Encoder | None = None
    helpers: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Piece:
    """Neighbouring rows of one tensor, and what is known of their outputs; no errors pass from one piece to another."""

    tensor: int
    rows: slice
    sensitivity: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Coded:
    """What becomes of a piece.

    Args:
        scale: float16 [n].
        difference: the sum of the squares of its errors.
        energy: that of the squares of its weights.
        decoded: float32 [n, K], on the GPU that worked on it; None: nobody wants it.
    """

    scale: np.ndarray
    difference: float
    energy: float
    decoded: torch.Tensor | None


def pieces_of(tensor: int, shape: tuple[int, int], sensitivity: np.ndarray | None, output_block: int) -> list[Piece]:
    """Rows whose outputs know each other, in pieces of their own; the same cut as in `quantize.trellis`. It is the same on any GPUs."""
    step, block = output_rows(shape[0]), max(TILE_OUTPUTS, output_block)
    if sensitivity is None or (step % block and step != shape[0]):
        return [Piece(tensor, slice(*cut), None) for cut in rotation.row_pieces(shape, block, _PIECE_WEIGHTS)]
    return [Piece(tensor, slice(start, start + step), sensitivity[start // step]) for start in range(0, shape[0], step)]


@dataclass(frozen=True, eq=False)
class Prepared:
    """Pieces on the GPU that works on them, before anything of the inputs is needed.

    Args:
        pieces: some.
        weights: of each, float32 [n, K].
        rotated: of each its weights in standard deviations, float32 [n, K], and the rounded scale they belong to, float16 [n].
        factors: of their outputs.
        moved: of some, by number, `moved_by` of the drift and what is rotated, once that is known.
    """

    pieces: list[Piece]
    weights: list[torch.Tensor]
    rotated: list[tuple[torch.Tensor, np.ndarray]]
    factors: OutputFactors
    moved: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Work:
    """What one GPU needs for its share of a group.

    Args:
        settings: how.
        names: of all tensors.
        weights: float32 [N_i, K], of all tensors; wherever they are.
        wanted: float64 [N_i], signed scales of the rows for unit variance.
        input_scale: float32 [K], s_in, on the device.
        blocks: of the rotation, inputs and outputs.
        packed: uint8 [ceil(N_i/64), ...], in the host's memory, where the bytes of all tensors go.
        device: where.
    """

    settings: Settings
    names: list[str]
    weights: list[torch.Tensor]
    wanted: list[np.ndarray]
    input_scale: torch.Tensor
    blocks: tuple[int, int]
    packed: list[torch.Tensor]
    device: str

    def to(self, device: str) -> Work:
        """The same for another GPU."""
        return replace(self, input_scale=self.input_scale.to(device), device=device)

    def prepare(self, pieces: list[Piece]) -> Prepared:
        """What can be done before the inputs are known; it is only sent to the GPU."""
        weights = [self.weights[piece.tensor][piece.rows].to(self.device) for piece in pieces]
        rotated = [self._rotate(piece, weight) for piece, weight in zip(pieces, weights)]
        return Prepared(pieces, weights, rotated, self._output_factors(pieces, [scale for _, scale in rotated]))

    def run(self, prepared: Prepared, metric: InputMetric) -> list[Coded]:
        """Quantize pieces.

        Args:
            prepared: the pieces; rotated weights are used up.
            metric: what is known of the inputs, on the device; used up.
        """
        bits = self.settings.bits_per_pair
        encoder = self.settings.encoder or _kernel(self.device, feedback=metric.known is not None)
        rotated, factors = self._corrected(prepared, metric)
        metric.drift = None
        if metric.known is None:
            encoded = [encode_plainly(rows, bits, encoder) for rows, _ in rotated]
        else:
            sheets = [Sheet(rows, factor) for (rows, _), factor in zip(rotated, factors)]
            encoded = encode_sheets(sheets, metric.known.factor(TILE_INPUTS), bits, encoder)
            metric.known.hessian()
        return self._finished(prepared, encoded, metric)

    def _corrected(self, prepared: Prepared, metric: InputMetric) -> tuple[list[tuple[torch.Tensor, np.ndarray]], list[Factor | None]]:
        """What to encode of each piece and its scale, as in `Prepared`, and the factors of their outputs."""
        bits, block, pieces = self.settings.bits_per_pair, self.blocks[1], prepared.pieces
        reach = max(trellis_code.WIDTHS[bits].table) / trellis_code.WIDTHS[bits].levels_per_sigma
        rotated = prepared.rotated
        # Kept to the end: memory must not go back to the stream that allocated it before the GPU has been waited for.
        before = list(rotated)
        for number, (rows, scale) in enumerate(before):
            rotated[number] = metric.corrected(rows, prepared.moved.get(number)), scale
        clipping = [sums.clips(rows, reach, block, scales.CLIPPING_IGNORED) for rows, _ in rotated]
        # Everything has been sent before anything is waited for.
        factors = prepared.factors.result()
        clipped = torch.stack(clipping).nonzero().flatten().tolist()
        prepared.moved.clear()
        for number in clipped:
            headroom = scales.headroom(rotated[number][0].cpu().numpy(), bits, block)
            rows, scale = self._rotate(pieces[number], prepared.weights[number], headroom)
            rotated[number] = metric.corrected(rows), scale
            factors[number] = self._output_factors([pieces[number]], [scale]).result()[0]
        return rotated, factors

    def _rotate(self, piece: Piece, weight: torch.Tensor, headroom: np.ndarray | float = 1.0) -> tuple[torch.Tensor, np.ndarray]:
        wanted = self.wanted[piece.tensor][piece.rows] * headroom
        per_sigma = trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma
        scale = scales.round_to_float16(wanted / per_sigma, self.names[piece.tensor])
        return rotate(weight, self._sigma(scale), self.input_scale, *self.blocks), scale

    def _sigma(self, scale: np.ndarray) -> torch.Tensor:
        """What a standard deviation in the coded basis is before it, float32 [n], from a scale, float16 [n]."""
        sigma = scale.astype(np.float32) * np.float32(trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma)
        return torch.from_numpy(sigma).to(self.device, non_blocking=True)

    def _output_factors(self, pieces: list[Piece], kept: list[np.ndarray]) -> OutputFactors:
        blocks = [(piece.sensitivity, scale.astype(np.float64)) for piece, scale in zip(pieces, kept)]
        return OutputFactors(blocks, self.blocks[1], self.device)

    def _finished(self, prepared: Prepared, encoded: list[tuple[torch.Tensor, torch.Tensor]], metric: InputMetric) -> list[Coded]:
        """The finished pieces: scales fitted again, and how far they are from their weights. The GPU is waited for once before each."""
        pieces, rotated = prepared.pieces, prepared.rotated
        sides = []
        if metric.known is not None:
            hessian = metric.known.matrix
            sides = [self._refit_sides(rows, levels, scale, hessian) for (rows, scale), (_, levels) in zip(rotated, encoded)]
        for piece, (packed, _) in zip(pieces, encoded):
            first = piece.rows.start // TILE_OUTPUTS
            self.packed[piece.tensor][first : first + len(packed)].copy_(packed, non_blocking=True)
        kept = self._kept(pieces, [scale for _, scale in rotated], sides)
        stops = np.cumsum([len(scale) for scale in kept]).tolist()
        there = torch.from_numpy(np.concatenate(kept).astype(np.float32)).to(self.device)
        squares, decoded = [], []
        for weight, (_, levels), stop, scale in zip(prepared.weights, encoded, stops, kept):
            rows = unrotate(levels, there[stop - len(scale) : stop], self.input_scale, *self.blocks)
            wide = weight.double()
            energy = wide.square().sum()
            squares.append(torch.stack([wide.sub_(rows).square_().sum(), energy]))
            decoded.append(None if metric.known is None else rows)
        # The copies have arrived, too, when this has.
        sums_of_squares = torch.stack(squares).tolist()
        return [Coded(scale, *pair, rows) for scale, pair, rows in zip(kept, sums_of_squares, decoded)]

    def _kept(self, pieces: list[Piece], kept: list[np.ndarray], sides: list[torch.Tensor]) -> list[np.ndarray]:
        """Better scales where what `_refit_sides` says allows them, float16 [n] of each piece."""
        if not sides:
            return kept
        linear, square = torch.cat(sides, 1).cpu().numpy()
        made: list[np.ndarray] = []
        first = 0
        for tensor, members in groupby(range(len(pieces)), lambda number: pieces[number].tensor):
            old = [kept[number] for number in members]
            stop = first + sum(map(len, old))
            better = better_scales(np.concatenate(old), linear[first:stop], square[first:stop], self.names[tensor])
            made += np.split(better, np.cumsum([len(scale) for scale in old])[:-1])
            first = stop
        return made

    def _refit_sides(self, rotated: torch.Tensor, levels: torch.Tensor, scale: np.ndarray, hessian: torch.Tensor) -> torch.Tensor:
        """Both sides of `quantize.refit.refit_output_scale`, of better output scales for given levels: float64 [2, n]."""
        rows = hadamard(levels.float(), self.blocks[1], along_outputs=True).double()
        targets = hadamard(rotated, self.blocks[1], along_outputs=True) * self._sigma(scale)[:, None]
        weighted = rows @ hessian
        linear = (weighted * targets).sum(1)
        return torch.stack([linear, weighted.mul_(rows).sum(1)])


def _kernel(device: str, feedback: bool) -> Encoder:
    """The quickest encoder of a GPU; without feedback one that decides ties as the processor does."""
    from septet.quantize_gpu import clusters, kernels

    number = torch.device(device).index
    if not clusters.fits(torch.cuda.current_device() if number is None else number):
        return kernels.encode
    return clusters.encode_from_both_ends if feedback else clusters.encode
