"""What one GPU does of a fused group: strips of rows are rotated, encoded, and their scales fitted again.

Until a strip is encoded nothing waits for the GPU while there is work to send: many of its kernels are small.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from septet.codes import trellis as trellis_code
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS
from septet.quantize import scales
from septet.quantize.refit import better_scales
from septet.quantize_gpu import sums
from septet.quantize_gpu.devices import number_of, on_side_streams, wait_for_side_stream
from septet.quantize_gpu.factorization import Factor
from septet.quantize_gpu.feedback import Encoder, Sheet, encode_plainly, encode_sheets
from septet.quantize_gpu.outputs import OutputFactors
from septet.quantize_gpu.pieces import Coded, Piece, Strip, strips_of
from septet.quantize_gpu.rotation import hadamard, rotate, unrotate
from septet.quantize_gpu.statistics import InputMetric

__all__ = ["Prepared", "Settings", "Work"]


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
class Prepared:
    """Pieces on the GPU that works on them, before anything of the inputs is needed.

    Args:
        strips: of them, in order.
        factors: of the outputs of all pieces.
        moved: by piece, `moved_by` of the drift and what is rotated, of those for which it has been found early.
    """

    strips: list[Strip]
    factors: OutputFactors
    moved: dict[Piece, torch.Tensor] = field(default_factory=dict)

    def pieces(self) -> list[Piece]:
        """All, in order."""
        return [piece for strip in self.strips for piece in strip.pieces]

    def rotated(self) -> list[torch.Tensor]:
        """Of each piece, float32 [n, K]."""
        return [strip.rotated[part] for strip in self.strips for part in strip.parts()]


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
        """The same for another GPU, inside `aside` of that."""
        # Not behind what this GPU has been given to do.
        with on_side_streams(self.device):
            there = self.input_scale.to(device)
        return replace(self, input_scale=there, device=device)

    def prepare(self, pieces: list[Piece]) -> Prepared:
        """What can be done before the inputs are known; it is only sent to the GPU."""
        strips = [self._strip(members) for members in strips_of(pieces, len(self.input_scale))]
        scale = [strip.scale[part] for strip in strips for part in strip.parts()]
        return Prepared(strips, self._output_factors(pieces, scale))

    def run(self, prepared: Prepared, metric: InputMetric) -> list[Coded]:
        """Quantize pieces.

        Args:
            prepared: the pieces; rotated weights are used up.
            metric: what is known of the inputs, on the device; used up.

        Returns:
            One for each strip.
        """
        bits = self.settings.bits_per_pair
        encoder = self.settings.encoder or _kernel(self.device, feedback=metric.known is not None)
        factors = self._correct(prepared, metric)
        metric.forget_moves()
        if metric.known is None:
            encoded = [encode_plainly(rows, bits, encoder) for rows in prepared.rotated()]
        else:
            sheets = [Sheet(rows, factor) for rows, factor in zip(prepared.rotated(), factors)]
            # Copies for other GPUs must have left.
            wait_for_side_stream(self.device)
            encoded = encode_sheets(sheets, metric.known.factor(TILE_INPUTS), bits, encoder)
            metric.known.hessian()
        return self._finished(prepared, encoded, metric)

    def _strip(self, pieces: list[Piece]) -> Strip:
        tensor, rows = pieces[0].tensor, slice(pieces[0].rows.start, pieces[-1].rows.stop)
        weights = self.weights[tensor][rows].to(self.device)
        return Strip(pieces, weights, *self._rotate(weights, self.wanted[tensor][rows], tensor))

    def _rotate(self, weights: torch.Tensor, wanted: np.ndarray, tensor: int) -> tuple[torch.Tensor, np.ndarray]:
        """`Strip.rotated` and `Strip.scale`."""
        per_sigma = trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma
        scale = scales.round_to_float16(wanted / per_sigma, self.names[tensor])
        return rotate(weights, self._sigma(scale), self.input_scale, *self.blocks), scale

    def _sigma(self, scale: np.ndarray) -> torch.Tensor:
        """What a standard deviation in the coded basis is before it, float32 [n], from a scale, float16 [n]."""
        sigma = scale.astype(np.float32) * np.float32(trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma)
        return torch.from_numpy(sigma).to(self.device, non_blocking=True)

    def _output_factors(self, pieces: list[Piece], kept: list[np.ndarray]) -> OutputFactors:
        blocks = [(piece.sensitivity, scale.astype(np.float64)) for piece, scale in zip(pieces, kept)]
        return OutputFactors(blocks, self.blocks[1], self.device)

    def _correct(self, prepared: Prepared, metric: InputMetric) -> list[Factor | None]:
        """Let what is rotated make up for moved inputs, and have room for that; returns the factors of the outputs."""
        bits, block = self.settings.bits_per_pair, self.blocks[1]
        reach = max(trellis_code.WIDTHS[bits].table) / trellis_code.WIDTHS[bits].levels_per_sigma
        # Kept until the GPU has been waited for: before, their memory must not go back to the stream that allocated it.
        before = [strip.rotated for strip in prepared.strips]
        for strip in prepared.strips:
            moved = [prepared.moved.get(piece) for piece in strip.pieces]
            strip.rotated = metric.corrected(strip.rotated, list(strip.parts()), moved)
        clipping = [sums.clips(strip.rotated, strip.parts(), reach, block, scales.CLIPPING_IGNORED) for strip in prepared.strips]
        # Everything has been sent before anything is waited for.
        factors = prepared.factors.result()
        clips = torch.cat(clipping).cpu().split([len(piece) // block for piece in prepared.pieces()])
        del before
        prepared.moved.clear()
        parts = [(strip, piece, part) for strip in prepared.strips for piece, part in zip(strip.pieces, strip.parts())]
        for number, (strip, piece, part) in enumerate(parts):
            if clips[number].any():
                headroom = scales.headroom(strip.rotated[part].cpu().numpy(), bits, block)
                wanted = self.wanted[piece.tensor][piece.rows] * headroom
                rows, strip.scale[part] = self._rotate(strip.weights[part], wanted, piece.tensor)
                strip.rotated[part] = metric.corrected(rows, [slice(0, len(rows))], [None])
                factors[number] = self._output_factors([piece], [strip.scale[part]]).result()[0]
        return factors

    def _finished(self, prepared: Prepared, encoded: list[tuple[torch.Tensor, torch.Tensor]], metric: InputMetric) -> list[Coded]:
        """What becomes of strips: scales fitted again, and how far they are from their weights. The GPU is waited for once before each."""
        coded = iter(encoded)
        levels = [torch.cat([next(coded)[1] for _ in strip.pieces]) for strip in prepared.strips]
        sides = []
        if metric.known is not None:
            sides = [self._refit_sides(strip, made, metric.known.matrix) for strip, made in zip(prepared.strips, levels)]
        for piece, (packed, _) in zip(prepared.pieces(), encoded):
            first = piece.rows.start // TILE_OUTPUTS
            self.packed[piece.tensor][first : first + len(packed)].copy_(packed, non_blocking=True)
        kept = self._better(prepared.strips, sides)
        there = torch.from_numpy(np.concatenate(kept).astype(np.float32)).to(self.device).split([len(scale) for scale in kept])
        squares, decoded = [], []
        for strip, made, scale in zip(prepared.strips, levels, there):
            rows = unrotate(made, scale, self.input_scale, *self.blocks)
            wide = strip.weights.double()
            energies = [wide[part].square().sum() for part in strip.parts()]
            wide.sub_(rows).square_()
            squares += [torch.stack([wide[part].sum(), energy]) for part, energy in zip(strip.parts(), energies)]
            decoded.append(None if metric.known is None else rows)
        # The copies have arrived, too, when this has.
        found = iter(torch.stack(squares).tolist())
        return [
            Coded(strip.pieces[0].tensor, scale, [next(found) for _ in strip.pieces], rows)
            for strip, scale, rows in zip(prepared.strips, kept, decoded)
        ]

    def _better(self, strips: list[Strip], sides: list[torch.Tensor]) -> list[np.ndarray]:
        """Scales of strips, float16 [n] each, better ones where what `_refit_sides` says allows them."""
        if not sides:
            return [strip.scale for strip in strips]
        ends = np.cumsum([len(strip.scale) for strip in strips])
        found = np.split(torch.cat(sides, 1).cpu().numpy(), ends[:-1], axis=1)
        return [better_scales(strip.scale, *both, self.names[strip.pieces[0].tensor]) for strip, both in zip(strips, found)]

    def _refit_sides(self, strip: Strip, levels: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
        """Both sides of `quantize.refit.refit_output_scale`, of better output scales for given levels: float64 [2, n]."""
        rows = hadamard(levels.float(), self.blocks[1], along_outputs=True).double()
        targets = hadamard(strip.rotated, self.blocks[1], along_outputs=True) * self._sigma(strip.scale)[:, None]
        weighted = torch.empty_like(rows)
        for part in strip.parts():
            torch.mm(rows[part], hessian, out=weighted[part])
        products = targets * weighted, weighted.mul_(rows)
        return torch.stack([torch.cat([product[part].sum(1) for part in strip.parts()]) for product in products])


def _kernel(device: str, feedback: bool) -> Encoder:
    """The quickest encoder of a GPU; without feedback one that decides ties as the processor does."""
    from septet.quantize_gpu import clusters, kernels

    if not clusters.fits(number_of(device)):
        return kernels.encode
    return clusters.encode_from_both_ends if feedback else clusters.encode
