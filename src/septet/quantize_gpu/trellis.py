"""Quantizing the tensors of a fused group on GPUs: the steps of `quantize.trellis`, on large pieces of the tensors.

Weights come to the last GPU, which finds the scales beside what the group's statistics take; the first one factorizes. Rows are dealt out
to all GPUs in pieces that do not depend on how many there are, and prepared while the statistics are still summed up. Memory: the Hessian
of the group's inputs in float64, their drift in float32, and about 20 bytes for each of the group's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from septet.codes.tile import check_bits, tile_bytes, tile_grid
from septet.quantize import GroupStatistics, QuantizedTensor, rotation, scales
from septet.quantize.statistics import output_rows
from septet.quantize.tensor import RowSource, common_inputs
from septet.quantize.trellis import row_scales
from septet.quantize_gpu import sums
from septet.quantize_gpu.devices import aside, beside, on_devices
from septet.quantize_gpu.pieces import Coded, Piece, pieces_of
from septet.quantize_gpu.rotation import dequantize as decode
from septet.quantize_gpu.shares import factorize, run, share
from septet.quantize_gpu.statistics import InputMetric, coded_inputs
from septet.quantize_gpu.uploads import upload
from septet.quantize_gpu.work import Settings, Work

__all__ = ["DecodedTensor", "dequantize", "quantize_trellis"]


@dataclass(frozen=True, eq=False)
class DecodedTensor(QuantizedTensor):
    """A tensor whose weights are on GPUs still.

    Args:
        decoded: float32 [n, K], neighbouring rows; emptied by whoever takes them.
    """

    decoded: list[torch.Tensor] = field(default_factory=list)


def dequantize(quantized: QuantizedTensor, device: str) -> torch.Tensor:
    """The weights that a tensor in code trellis stands for: float32 [N, K] on a device. From a `DecodedTensor` they are taken away."""
    if isinstance(quantized, DecodedTensor) and quantized.decoded:
        there = [rows.to(device) for rows in quantized.decoded]
        quantized.decoded.clear()
        return torch.cat(there) if len(there) > 1 else there[0]
    return decode(quantized, device)


def quantize_trellis(
    weights: Sequence[RowSource],
    names: list[str],
    settings: Settings,
    statistics: Callable[[], GroupStatistics | None] = lambda: None,
) -> list[DecodedTensor]:
    """Quantize the tensors of one fused group.

    Args:
        weights: [N_i, K], finite; slices of rows must be float32 arrays.
        names: a module name for each; they and the seed choose the random signs. The first one names the group.
        settings: how.
        statistics: called once, while weights are on their way to the GPU: what is known of the group's inputs and outputs, arrays or
            tensors on the device; None: plain rounding. Tensors are used up.

    Returns:
        One tensor per weight, with the same input_scale and input_block; decoded where there were statistics.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown width or block.
        ShapeError: the weights do not have the same number of inputs, or the statistics have others.
    """
    check_bits(settings.bits_per_pair)
    return on_devices([(settings.device, lambda chosen: _quantize(weights, names, chosen, statistics), settings)])[0]


def _quantize(
    weights: Sequence[RowSource], names: list[str], settings: Settings, statistics: Callable[[], GroupStatistics | None]
) -> list[DecodedTensor]:
    """`quantize_trellis` while its GPU is the current one."""
    bits, device = settings.bits_per_pair, settings.device
    inputs, outputs = common_inputs(weights), [weight.shape[0] for weight in weights]
    # Not the first GPU, if there is work for several: statistics come together there.
    most_pieces = sum(count // output_rows(count) for count in outputs)
    home = [device, *settings.helpers][min(len(settings.helpers), most_pieces - 1)]
    there = [torch.empty(tuple(weight.shape), device=home) for weight in weights]
    with beside(home, lambda: _measure(weights, names, there)) as measured:
        found = statistics()
        columns, plain, divided = measured()
    if found is not None:
        found.check(inputs, outputs, names[0])
    input_block = rotation.choose_block([inputs], settings.rotation_block)
    output_block = rotation.choose_block(outputs, settings.rotation_block)
    known = found.outputs if found is not None else None
    magnitudes, columns, exponent = row_scales(
        lambda scale: plain if scale is None else divided, columns, known or [None] * len(names), output_block, bits
    )
    input_scale = columns * rotation.random_signs(settings.seed, f"{names[0]}/in", inputs)
    signs = [rotation.random_signs(settings.seed, f"{name}/out", count) for name, count in zip(names, outputs)]
    wanted = [sign * magnitude / 2.0**exponent for sign, magnitude in zip(signs, magnitudes)]
    packed = [_bytes_for(tuple(weight.shape), bits, device) for weight in weights]
    with aside(device):
        there_scale = torch.from_numpy(input_scale).to(device)
    work = Work(settings, names, there, wanted, there_scale, (input_block, output_block), packed, device)
    pieces = _pieces(there, known, output_block)
    # Beside what the statistics have given the GPUs to do, which nobody has waited for.
    shares = share(work, pieces, settings.helpers)
    there_scales = {one.work.device: one.work.input_scale for one in shares}
    metrics = factorize(coded_inputs(found, there_scales, input_block), shares)
    # The drift goes as soon as it has been made up for.
    del found
    if known is not None and metrics[0].known is None:
        # The inputs are of no use, so rows are rounded plainly.
        pieces = _pieces(there, None, output_block)
        shares = share(work, pieces, settings.helpers)
        metrics = [InputMetric() for _ in shares]
    coded = run(shares, metrics)
    made = []
    for tensor, weight in enumerate(there):
        mine = [one for one in coded if one.tensor == tensor]
        made.append(_joined(mine, packed[tensor].numpy(), tuple(weight.shape), input_scale, work))
    return made


def _measure(
    weights: Sequence[RowSource], names: list[str], there: list[torch.Tensor]
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Bring weights to the GPU and look at them.

    Args:
        weights: [N_i, K].
        names: for messages.
        there: float32 [N_i, K] each, where to put them.

    Returns:
        |s_in| as fp16 holds it, float32 [K]; and the root mean squares of rows, float64 [N_i] each: as they are, and divided by it.
    """
    for weight, place in zip(weights, there):
        upload(weight, place)
    plain = [sums.row_norms(place) for place in there]
    for norms, name in zip(plain, names):
        scales.check_finite(norms, name)
    columns = scales.common_input_scale([sums.column_norms(place) for place in there])
    columns = scales.round_to_float16(columns, names[0]).astype(np.float32)
    return columns, plain, [sums.row_norms(place, columns) for place in there]


def _bytes_for(shape: tuple[int, int], bits: int, device: str) -> torch.Tensor:
    """Where the bytes of a matrix's tiles go: page-locked where a GPU writes them, since memory that is new to a process takes longer."""
    rows, columns = tile_grid(*shape)
    return torch.empty((rows, columns * tile_bytes(bits)), dtype=torch.uint8, pin_memory=device.startswith("cuda"))


def _pieces(weights: list[torch.Tensor], sensitivities: tuple[np.ndarray, ...] | None, output_block: int) -> list[Piece]:
    """All pieces of a group, in order."""
    known = sensitivities or [None] * len(weights)
    return [piece for tensor, weight in enumerate(weights) for piece in pieces_of(tensor, weight.shape, known[tensor], output_block)]


def _joined(coded: list[Coded], packed: np.ndarray, shape: tuple[int, int], input_scale: np.ndarray, work: Work) -> DecodedTensor:
    """The finished tensor."""
    return DecodedTensor(
        code="trellis",
        bits_per_pair=work.settings.bits_per_pair,
        shape=shape,
        packed=packed,
        scale=np.concatenate([one.scale for one in coded]),
        input_scale=input_scale.astype(np.float16),
        input_block=work.blocks[0],
        output_block=work.blocks[1],
        relative_error=scales.ratio_of_norms(*(sum(pair[side] for one in coded for pair in one.squares) for side in (0, 1))),
        decoded=[one.decoded for one in coded if one.decoded is not None],
    )
