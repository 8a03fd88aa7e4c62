"""Quantizing the tensors of a fused group on a GPU: the steps of `quantize.trellis`, on whole tensors.

Memory there: the Hessian of the group's inputs six times in float64, and about 20 bytes for each of the group's weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from septet.codes import trellis as trellis_code
from septet.codes.tile import TILE_OUTPUTS, check_bits
from septet.quantize import GroupStatistics, QuantizedTensor, rotation, scales
from septet.quantize.refit import better_scales
from septet.quantize.statistics import output_rows
from septet.quantize.tensor import RowSource, common_inputs
from septet.quantize.trellis import row_scales
from septet.quantize_gpu import sums
from septet.quantize_gpu.feedback import Encoder, Sheet, encode_plainly, encode_sheets
from septet.quantize_gpu.linear_algebra import InputMetric, input_metric, output_factor
from septet.quantize_gpu.rotation import hadamard_outputs, rotate, unrotate

__all__ = ["Settings", "quantize_trellis"]

#: Rows are refitted in pieces of about this many weights.
_PIECE_WEIGHTS = 1 << 25


@dataclass(frozen=True)
class Settings:
    """How to quantize.

    Args:
        bits_per_pair: 6, 7 or 8.
        rotation_block: the largest Hadamard block, a power of two.
        seed: of the random signs.
        device: "cuda", "cuda:1", ...; "cpu" works with an encoder of one's own.
        encoder: of tiles; None: the Triton kernel.
    """

    bits_per_pair: int = 7
    rotation_block: int = 256
    seed: int = 0
    device: str = "cuda"
    encoder: Encoder | None = None


def quantize_trellis(
    weights: Sequence[RowSource], names: list[str], settings: Settings, statistics: GroupStatistics | None = None
) -> list[QuantizedTensor]:
    """Quantize the tensors of one fused group.

    Args:
        weights: [N_i, K], finite; slices of rows must be float32 arrays.
        names: a module name for each; they and the seed choose the random signs. The first one names the group.
        settings: how.
        statistics: of the group's inputs and outputs, arrays or tensors on the device; None: plain rounding.

    Returns:
        One QuantizedTensor per weight, with the same input_scale and input_block.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown width or block.
        ShapeError: the weights do not have the same number of inputs, or the statistics have others.
    """
    bits, device = settings.bits_per_pair, settings.device
    check_bits(bits)
    inputs, outputs = common_inputs(weights), [weight.shape[0] for weight in weights]
    if statistics is not None:
        statistics.check(inputs, outputs, names[0])
    input_block = rotation.choose_block([inputs], settings.rotation_block)
    output_block = rotation.choose_block(outputs, settings.rotation_block)
    known = statistics.outputs if statistics is not None else None
    there = [torch.from_numpy(np.ascontiguousarray(weight[:])).to(device) for weight in weights]

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
    group = _Group(settings, input_scale, there_scale, input_block, output_block, metric)
    wanted = [rotation.random_signs(settings.seed, f"{name}/out", count) for name, count in zip(names, outputs)]
    wanted = [signs * magnitude / 2.0**exponent for signs, magnitude in zip(wanted, magnitudes)]
    rotated = [group.rotated(*parts) for parts in zip(there, wanted, names)]
    encoded = group.encode([rows for rows, _ in rotated], [scale for _, scale in rotated], known)
    made = []
    for position, (packed, levels) in enumerate(encoded):
        rows, scale = rotated[position]
        made.append(group.finished(there[position], group.refit(rows, levels, scale, names[position]), packed, levels))
    return made


@dataclass(frozen=True, eq=False)
class _Group:
    """What all tensors of a group share: s_in float32 [K], here and on the device, the rotation blocks, and what is known of the inputs."""

    settings: Settings
    input_scale: np.ndarray
    there_scale: torch.Tensor
    input_block: int
    output_block: int
    metric: InputMetric

    def rotated(self, weight: torch.Tensor, wanted: np.ndarray, name: str) -> tuple[torch.Tensor, np.ndarray]:
        """Rotated weights in standard deviations, float32 [N, K], and the rounded scale they belong to, float16 [N]."""
        bits = self.settings.bits_per_pair
        rows, scale = self._rotate(weight, wanted, name)
        reach = max(trellis_code.WIDTHS[bits].table) / trellis_code.WIDTHS[bits].levels_per_sigma
        if sums.clips(rows, reach, self.output_block, scales.CLIPPING_IGNORED):
            factors = scales.headroom(rows.cpu().numpy(), bits, self.output_block)
            rows, scale = self._rotate(weight, wanted * factors, name)
        return rows, scale

    def _rotate(self, weight: torch.Tensor, wanted: np.ndarray, name: str) -> tuple[torch.Tensor, np.ndarray]:
        scale = scales.round_to_float16(wanted / trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma, name)
        rows = rotate(weight, self._sigma(scale), self.there_scale, self.input_block, self.output_block)
        if self.metric.correction is not None:
            rows = (rows.double() @ self.metric.correction).float()
        return rows, scale

    def _sigma(self, scale: np.ndarray) -> torch.Tensor:
        """What a standard deviation in the coded basis is before it, float32 [N], from a scale, float16 [N]."""
        sigma = scale.astype(np.float32) * np.float32(trellis_code.WIDTHS[self.settings.bits_per_pair].levels_per_sigma)
        return torch.from_numpy(sigma).to(self.settings.device)

    def encode(
        self, rotated: list[torch.Tensor], scale: list[np.ndarray], known: Sequence[np.ndarray] | None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Packed and levels of each tensor."""
        bits, encoder = self.settings.bits_per_pair, self.settings.encoder or _kernel()
        if self.metric.factor is None:
            return [encode_plainly(rows, bits, encoder) for rows in rotated]
        sheets: list[Sheet] = []
        counts = []
        for position, rows in enumerate(rotated):
            cut = self._sheets(rows, scale[position], None if known is None else known[position])
            counts.append(len(cut))
            sheets += cut
        made = iter(encode_sheets(sheets, self.metric.factor, bits, encoder))
        parts = [[next(made) for _ in range(count)] for count in counts]
        return [tuple(torch.cat(pieces) for pieces in zip(*part)) for part in parts]

    def _sheets(self, rows: torch.Tensor, scale: np.ndarray, sensitivity: np.ndarray | None) -> list[Sheet]:
        """Rows whose outputs know each other in sheets of their own; the same cut as in `quantize.trellis`."""
        step = output_rows(len(rows))
        if sensitivity is None or (step % max(TILE_OUTPUTS, self.output_block) and step != len(rows)):
            return [Sheet(rows)]
        sheets = []
        for number, start in enumerate(range(0, len(rows), step)):
            part = slice(start, start + step)
            factor = output_factor(sensitivity[number], scale[part].astype(np.float64), self.output_block, self.settings.device)
            sheets.append(Sheet(rows[part], factor))
        return sheets

    def refit(self, rotated: torch.Tensor, levels: torch.Tensor, scale: np.ndarray, name: str) -> np.ndarray:
        """`quantize.refit.refit_output_scale`: better output scales for given levels, float16 [N]."""
        if self.metric.hessian is None:
            return scale
        linear, square = np.empty(len(scale)), np.empty(len(scale))
        sigma = self._sigma(scale)[:, None]
        for start, stop in rotation.row_pieces(rotated.shape, self.output_block, _PIECE_WEIGHTS):
            rows = hadamard_outputs(levels[start:stop].float(), self.output_block).double()
            targets = hadamard_outputs(rotated[start:stop], self.output_block) * sigma[start:stop]
            weighted = rows @ self.metric.hessian
            linear[start:stop] = (weighted * targets).sum(1).cpu().numpy()
            square[start:stop] = weighted.mul_(rows).sum(1).cpu().numpy()
        return better_scales(scale, linear, square, name)

    def finished(self, weight: torch.Tensor, scale: np.ndarray, packed: torch.Tensor, levels: torch.Tensor) -> QuantizedTensor:
        """The finished tensor."""
        stored = torch.from_numpy(scale.astype(np.float32)).to(self.settings.device)
        difference = energy = 0.0
        for start, stop in rotation.row_pieces(weight.shape, self.output_block, _PIECE_WEIGHTS):
            part = slice(start, stop)
            decoded = unrotate(levels[part], stored[part], self.there_scale, self.input_block, self.output_block)
            rows = weight[part].double()
            energy += float(rows.square().sum())
            difference += float((rows - decoded).square_().sum())
        return QuantizedTensor(
            code="trellis",
            bits_per_pair=self.settings.bits_per_pair,
            shape=tuple(weight.shape),
            packed=packed.cpu().numpy(),
            scale=scale,
            input_scale=self.input_scale.astype(np.float16),
            input_block=self.input_block,
            output_block=self.output_block,
            relative_error=scales.ratio_of_norms(difference, energy),
        )


def _kernel() -> Encoder:
    from septet.quantize_gpu.kernels import encode

    return encode
