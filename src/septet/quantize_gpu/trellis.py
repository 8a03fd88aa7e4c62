"""Quantizing the tensors of a fused group on GPUs: the steps of `quantize.trellis`, on large pieces of the tensors.

Scales and the factorization are found on one GPU. Then rows are dealt out to all of them in pieces that do not depend on how many there
are. Memory: the Hessian of the group's inputs in float64, their drift in float32, and about 20 bytes for each of the group's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from septet.codes import trellis as trellis_code
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS, check_bits
from septet.quantize import GroupStatistics, QuantizedTensor, rotation, scales
from septet.quantize.refit import better_scales
from septet.quantize.statistics import output_rows
from septet.quantize.tensor import RowSource, common_inputs
from septet.quantize.trellis import row_scales
from septet.quantize_gpu import sums
from septet.quantize_gpu.devices import on_devices, to_host
from septet.quantize_gpu.feedback import Encoder, Sheet, encode_plainly, encode_sheets
from septet.quantize_gpu.linear_algebra import Factor, InputMetric, input_metric, output_factor
from septet.quantize_gpu.rotation import hadamard_outputs, rotate, unrotate
from septet.quantize_gpu.uploads import uploaded

__all__ = ["Settings", "quantize_trellis"]

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


def quantize_trellis(
    weights: Sequence[RowSource], names: list[str], settings: Settings, statistics: GroupStatistics | None = None
) -> list[QuantizedTensor]:
    """Quantize the tensors of one fused group.

    Args:
        weights: [N_i, K], finite; slices of rows must be float32 arrays.
        names: a module name for each; they and the seed choose the random signs. The first one names the group.
        settings: how.
        statistics: of the group's inputs and outputs, arrays or tensors on the device; None: plain rounding. Tensors are used up.

    Returns:
        One QuantizedTensor per weight, with the same input_scale and input_block.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown width or block.
        ShapeError: the weights do not have the same number of inputs, or the statistics have others.
    """
    check_bits(settings.bits_per_pair)
    return on_devices([(settings.device, lambda chosen: _quantize(weights, names, chosen, statistics), settings)])[0]


def _quantize(
    weights: Sequence[RowSource], names: list[str], settings: Settings, statistics: GroupStatistics | None
) -> list[QuantizedTensor]:
    """`quantize_trellis` while its GPU is the current one."""
    bits, device = settings.bits_per_pair, settings.device
    inputs, outputs = common_inputs(weights), [weight.shape[0] for weight in weights]
    if statistics is not None:
        statistics.check(inputs, outputs, names[0])
    input_block = rotation.choose_block([inputs], settings.rotation_block)
    output_block = rotation.choose_block(outputs, settings.rotation_block)
    known = statistics.outputs if statistics is not None else None
    there = [uploaded(weight, device) for weight in weights]

    def row_norms(columns: np.ndarray | None) -> list[np.ndarray]:
        return [sums.row_norms(weight, columns) for weight in there]

    for norms, name in zip(row_norms(None), names):
        scales.check_finite(norms, name)
    columns = scales.common_input_scale([sums.column_norms(weight) for weight in there])
    columns = scales.round_to_float16(columns, names[0]).astype(np.float32)
    magnitudes, columns, exponent = row_scales(row_norms, columns, known or [None] * len(names), output_block, bits)
    input_scale = columns * rotation.random_signs(settings.seed, f"{names[0]}/in", inputs)
    there_scale = torch.from_numpy(input_scale).to(device)
    metric = input_metric(statistics, there_scale, input_block)
    signs = [rotation.random_signs(settings.seed, f"{name}/out", count) for name, count in zip(names, outputs)]
    wanted = [sign * magnitude / 2.0**exponent for sign, magnitude in zip(signs, magnitudes)]
    work = _Work(settings, names, there, wanted, there_scale, (input_block, output_block), metric, device)
    pieces = [
        piece
        for tensor, weight in enumerate(there)
        for piece in _pieces(tensor, weight.shape, None if known is None or metric.known is None else known[tensor], output_block)
    ]
    coded = share(work, pieces, settings.helpers)
    made = []
    for tensor, weight in enumerate(there):
        mine = [one for piece, one in zip(pieces, coded) if piece.tensor == tensor]
        made.append(_joined(mine, tuple(weight.shape), input_scale, work))
    return made


def share(work: _Work, pieces: list[_Piece], helpers: Sequence[str]) -> list[_Coded]:
    """What becomes of all pieces, neighbours on one GPU: on `work`'s own and on helpers, of which each gets about the same."""
    devices = [work.device, *helpers[: len(pieces) - 1]]
    rows = np.cumsum([0] + [piece.rows.stop - piece.rows.start for piece in pieces])
    owner = np.minimum((rows[:-1] + rows[1:]) * len(devices) // (2 * rows[-1]), len(devices) - 1)
    shares = [[piece for piece, number in zip(pieces, owner) if number == own] for own in range(len(devices))]
    # Nobody begins before all copies are made: work uses up what it was given.
    calls = [(device, (work.to(device) if own else work).run, part) for own, (device, part) in enumerate(zip(devices, shares)) if part]
    return [one for part in on_devices(calls) for one in part]


def _joined(coded: list[_Coded], shape: tuple[int, int], input_scale: np.ndarray, work: _Work) -> QuantizedTensor:
    """The finished tensor."""
    return QuantizedTensor(
        code="trellis",
        bits_per_pair=work.settings.bits_per_pair,
        shape=shape,
        packed=np.concatenate([one.packed for one in coded]),
        scale=np.concatenate([one.scale for one in coded]),
        input_scale=input_scale.astype(np.float16),
        input_block=work.blocks[0],
        output_block=work.blocks[1],
        relative_error=scales.ratio_of_norms(sum(one.difference for one in coded), sum(one.energy for one in coded)),
    )


@dataclass(frozen=True, eq=False)
class _Piece:
    """Neighbouring rows of one tensor, and what is known of their outputs; no errors pass from one piece to another."""

    tensor: int
    rows: slice
    sensitivity: np.ndarray | None


@dataclass(frozen=True, eq=False)
class _Coded:
    """What becomes of a piece: in host memory, and two sums for the relative error."""

    packed: np.ndarray
    scale: np.ndarray
    difference: float
    energy: float


def _pieces(tensor: int, shape: tuple[int, int], sensitivity: np.ndarray | None, output_block: int) -> list[_Piece]:
    """Rows whose outputs know each other, in pieces of their own; the same cut as in `quantize.trellis`. It is the same on any GPUs."""
    step, block = output_rows(shape[0]), max(TILE_OUTPUTS, output_block)
    if sensitivity is None or (step % block and step != shape[0]):
        return [_Piece(tensor, slice(*cut), None) for cut in rotation.row_pieces(shape, block, _PIECE_WEIGHTS)]
    return [_Piece(tensor, slice(start, start + step), sensitivity[start // step]) for start in range(0, shape[0], step)]


@dataclass(frozen=True, eq=False)
class _Work:
    """What one GPU needs for its share of a group.

    Args:
        settings: how.
        names: of all tensors.
        weights: float32 [N_i, K], of all tensors; wherever they are.
        wanted: float64 [N_i], signed scales of the rows for unit variance.
        input_scale: float32 [K], s_in, on the device.
        blocks: of the rotation, inputs and outputs.
        metric: what is known of the inputs, on the device; used up.
        device: where.
    """

    settings: Settings
    names: list[str]
    weights: list[torch.Tensor]
    wanted: list[np.ndarray]
    input_scale: torch.Tensor
    blocks: tuple[int, int]
    metric: InputMetric
    device: str

    def to(self, device: str) -> _Work:
        """The same for another GPU, with copies of what is used up."""
        return replace(self, input_scale=self.input_scale.to(device), metric=self.metric.to(device), device=device)

    def run(self, pieces: list[_Piece]) -> list[_Coded]:
        """Quantize some pieces."""
        bits, metric = self.settings.bits_per_pair, self.metric
        encoder = self.settings.encoder or _kernel(self.device, feedback=metric.known is not None)
        rotated = self._rotated(pieces)
        metric.drift = None
        if metric.known is None:
            encoded = [encode_plainly(rows, bits, encoder) for rows, _ in rotated]
        else:
            sheets = [Sheet(rows, self._output_factor(piece, scale)) for piece, (rows, scale) in zip(pieces, rotated)]
            encoded = encode_sheets(sheets, metric.known.factor(TILE_INPUTS), bits, encoder)
            metric.known.hessian()
        return self._finished(pieces, rotated, encoded)

    def _rotated(self, pieces: list[_Piece]) -> list[tuple[torch.Tensor, np.ndarray]]:
        """Of each piece rotated weights in standard deviations, float32 [n, K], and the rounded scale they belong to, float16 [n]."""
        bits, block = self.settings.bits_per_pair, self.blocks[1]
        reach = max(trellis_code.WIDTHS[bits].table) / trellis_code.WIDTHS[bits].levels_per_sigma
        rotated = [self._rotate(piece) for piece in pieces]
        # All are looked at before anything waits for the GPU.
        clipping = [sums.clips(rows, reach, block, scales.CLIPPING_IGNORED) for rows, _ in rotated]
        for number in torch.stack(clipping).nonzero().flatten().tolist():
            rotated[number] = self._rotate(pieces[number], scales.headroom(rotated[number][0].cpu().numpy(), bits, block))
        return rotated

    def _rotate(self, piece: _Piece, headroom: np.ndarray | float = 1.0) -> tuple[torch.Tensor, np.ndarray]:
        weight, wanted = self.weights[piece.tensor][piece.rows].to(self.device), self.wanted[piece.tensor][piece.rows] * headroom
        per_sigma = trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma
        scale = scales.round_to_float16(wanted / per_sigma, self.names[piece.tensor])
        rows = rotate(weight, self._sigma(scale), self.input_scale, *self.blocks)
        return self.metric.corrected(rows), scale

    def _sigma(self, scale: np.ndarray) -> torch.Tensor:
        """What a standard deviation in the coded basis is before it, float32 [n], from a scale, float16 [n]."""
        sigma = scale.astype(np.float32) * np.float32(trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma)
        return torch.from_numpy(sigma).to(self.device, non_blocking=True)

    def _output_factor(self, piece: _Piece, scale: np.ndarray) -> Factor | None:
        if piece.sensitivity is None:
            return None
        return output_factor(piece.sensitivity, scale.astype(np.float64), self.blocks[1], self.device)

    def _finished(
        self, pieces: list[_Piece], rotated: list[tuple[torch.Tensor, np.ndarray]], encoded: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[_Coded]:
        """The finished pieces: scales fitted again, and how far they are from their weights. Nothing waits while there is work to send."""
        kept = [scale for _, scale in rotated]
        if self.metric.known is not None:
            sides = [self._refit_sides(rows, levels, scale) for (rows, scale), (_, levels) in zip(rotated, encoded)]
            names = [self.names[piece.tensor] for piece in pieces]
            kept = [better_scales(old, *(side.cpu().numpy() for side in both), name) for old, both, name in zip(kept, sides, names)]
        errors = [self._errors(piece, levels, scale) for piece, (_, levels), scale in zip(pieces, encoded, kept)]
        return [
            _Coded(to_host(packed).numpy(), scale, float(difference), float(energy))
            for (packed, _), scale, (difference, energy) in zip(encoded, kept, errors)
        ]

    def _errors(self, piece: _Piece, levels: torch.Tensor, scale: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """The squares of what a piece is off, and of its weights, float64 []."""
        stored = torch.from_numpy(scale.astype(np.float32)).to(self.device, non_blocking=True)
        decoded = unrotate(levels, stored, self.input_scale, *self.blocks)
        weight = self.weights[piece.tensor][piece.rows].to(self.device).double()
        energy = weight.square().sum()
        return (weight - decoded).square_().sum(), energy

    def _refit_sides(self, rotated: torch.Tensor, levels: torch.Tensor, scale: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Both sides of `quantize.refit.refit_output_scale`, of better output scales for given levels: float64 [n] each."""
        rows = hadamard_outputs(levels.float(), self.blocks[1]).double()
        targets = hadamard_outputs(rotated, self.blocks[1]) * self._sigma(scale)[:, None]
        weighted = rows @ self.metric.known.matrix
        linear = (weighted * targets).sum(1)
        return linear, weighted.mul_(rows).sum(1)


def _kernel(device: str, feedback: bool) -> Encoder:
    """The quickest encoder of a GPU; without feedback one that decides ties as the processor does."""
    from septet.quantize_gpu import clusters, kernels

    number = torch.device(device).index
    if not clusters.fits(torch.cuda.current_device() if number is None else number):
        return kernels.encode
    return clusters.encode_from_both_ends if feedback else clusters.encode
