"""Whole layers on a GPU: which kernels run for which layer and how many tokens.

A few tokens of a trellis layer go through the fused kernels of product.cu, 32 at a time; many through its decoded levels and a dense
product on the tensor cores. What these do not take (code split, tiny or huge Hadamard blocks, no NVRTC) runs in `portable`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch

from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS
from septet.gpu import compiled, launches, many, portable
from septet.gpu.driver import obstacle
from septet.gpu.layout import UNIT_INPUTS, arrange, units_of

__all__ = ["GPU_VARIABLE", "Layer", "dequantize", "embedding", "linear", "prepare"]

#: SEPTET_GPU=triton leaves the CUDA kernels aside.
GPU_VARIABLE = "SEPTET_GPU"
#: Up to here tokens go through `launches.product`, with int8 and with float activations; measured on an H100.
FEW_TOKENS, FEW_FLOAT_TOKENS = 64, 48
#: With no more inputs `many` has so few steps that it wins from fewer int8 tokens on; with as few outputs, from the second launch of a
#: product on. Measured on an H100.
_SHORT, _FEW_SHORT_TOKENS, _FEW_SMALL_TOKENS = 4096, 40, launches.MOST_TOKENS
#: Tokens of a launch, whose blocks along y they are: at most 65535 of them, and a power of two keeps parts of a tensor aligned.
_LAUNCH_TOKENS = 1 << 15
#: Levels of many tokens' products are decoded in pieces of at most so many bytes.
_LEVEL_BYTES = 512 << 20
#: Inputs that share a scale in `portable.dense`, at most.
_DENSE_SEGMENT = 256


@dataclass(frozen=True, eq=False)
class Layer:
    """What a GPU keeps of a layer besides its stored tensors.

    Args:
        code, bits, inputs, outputs, input_block, output_block: as in the layer's description.
        segment: inputs that share an int8 activation scale.
        arranged: packed bytes in the order of product.cu, or None where `portable` reads the stored ones.
        scale, input_scale: float16, contiguous; scale of split in float32.
        offset: float32 or None.
        table: level table for `portable`, or None.
        slots: for `launches.whole_layer`, or None. Because of them a layer must not run twice at the same time.
    """

    code: str
    bits: int
    inputs: int
    outputs: int
    input_block: int
    output_block: int
    segment: int
    arranged: torch.Tensor | None
    scale: torch.Tensor
    input_scale: torch.Tensor | None
    offset: torch.Tensor | None
    table: torch.Tensor | None
    slots: torch.Tensor | None

    @property
    def rows(self) -> int:
        """Rows of tiles."""
        return -(-self.outputs // TILE_OUTPUTS)

    @property
    def padded_inputs(self) -> int:
        """Inputs rounded up to whole tiles."""
        return self.inputs if self.code == "int8" else -(-self.inputs // TILE_INPUTS) * TILE_INPUTS

    @property
    def segmented(self) -> bool:
        """Whether there are several activation scales per token."""
        return self.segment < self.padded_inputs


def _uses_cuda(device: torch.device) -> bool:
    chosen = device.type == "cuda" and torch.version.cuda is not None and os.environ.get(GPU_VARIABLE) != "triton"
    return chosen and not obstacle() and _has_instructions(device.index)


@cache
def _has_instructions(device: int) -> bool:
    """Whether a GPU has what all CUDA kernels use, such as bfloat16: compute capability 8 and later."""
    return torch.cuda.get_device_capability(device)[0] >= 8


def prepare(tensors: tuple, sizes: tuple, segment: int) -> Layer:
    """Rearrange a layer once.

    Args:
        tensors: weight, scale, input scale or None, offset or None, as stored.
        sizes: code, bits, inputs, outputs, input_block, output_block.
        segment: inputs that share an int8 activation scale.
    """
    weight, scale, input_scale, offset = tensors
    code, bits, inputs, outputs, input_block, output_block = sizes
    arranged = table = slots = None
    fits = max(input_block, output_block) <= launches.LARGEST_BLOCK
    segment_fits = segment >= inputs or segment % 64 == 0
    if code == "trellis" and fits and segment_fits and _uses_cuda(weight.device) and compiled.fits(weight.device.index):
        arranged = arrange(weight.detach(), bits)
        slots = launches.empty_slots(inputs, len(weight), weight.device)
    elif code != "int8":
        table = portable.level_table(weight.device)
    if code == "split":
        scale, offset = (None if t is None else t.detach().to(torch.float32).contiguous() for t in (scale, offset))
    else:
        scale, input_scale = (t.detach().to(torch.float16).clone() for t in (scale, input_scale))
    return Layer(*sizes, segment, arranged, scale, input_scale, offset, table, slots)


def linear(x: torch.Tensor, weight: torch.Tensor, layer: Layer, activations: str) -> torch.Tensor:
    """A whole layer without its bias.

    Args:
        x: float32, bfloat16 or float16 [M, K], contiguous, M at least 1.
        weight: as stored.
        layer: from `prepare`.
        activations: "int8" or "float".

    Returns:
        [M, N], the dtype of `x`.
    """
    if layer.arranged is None:
        return _portable(x, weight.contiguous(), layer, activations)
    if len(x) > _LAUNCH_TOKENS:
        return torch.cat([linear(part, weight, layer, activations) for part in x.split(_LAUNCH_TOKENS)])
    is_float = activations == "float"
    # so few never go there, whatever the layer
    takes_many = len(x) > launches.MOST_TOKENS and many.takes(layer, x, activations)
    if len(x) > _few_tokens_of(layer, is_float, takes_many):
        return many.linear(x, layer, activations) if takes_many else _many_tokens(x, layer, activations)
    most = launches.MOST_FLOAT_TOKENS if is_float else launches.MOST_TOKENS
    parts = [_few_tokens(part, layer, activations) for part in x.split(most)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _few_tokens_of(layer: Layer, is_float: bool, takes_many: bool) -> int:
    """How many tokens `_few_tokens` gets at most."""
    if is_float or not takes_many or layer.inputs > _SHORT:
        return FEW_FLOAT_TOKENS if is_float else FEW_TOKENS
    return _FEW_SMALL_TOKENS if layer.outputs <= _SHORT else _FEW_SHORT_TOKENS


def _few_tokens(x: torch.Tensor, layer: Layer, activations: str) -> torch.Tensor:
    blocks = layer.input_block, layer.output_block
    if activations == "int8" and launches.takes_whole_layer(*x.shape, layer.outputs, blocks, x.device.index):
        scales, segment = (layer.input_scale, layer.scale), layer.segment if layer.segmented else None
        return launches.whole_layer(x, layer.arranged, layer.bits, scales, blocks, segment, layer.slots)
    kind = "int8" if activations == "int8" else "halves"
    values, scales = launches.rotate(x, layer.input_scale, layer.input_block, layer.segmented, kind)
    segment = layer.segment if layer.segmented else None
    sums, workers = launches.product(layer.arranged, layer.bits, layer.rows, values, scales, segment)
    slots = layer.rows, units_of(layer.inputs), workers
    return launches.finish(sums, None if segment else scales, layer.scale, layer.output_block, x.dtype, slots)


def _many_tokens(x: torch.Tensor, layer: Layer, activations: str) -> torch.Tensor:
    units, is_float = units_of(layer.inputs), activations == "float"
    values, scales = launches.rotate(x, layer.input_scale, layer.input_block, layer.segmented, "float32" if is_float else "int8")
    segment = min(layer.segment, _DENSE_SEGMENT) if layer.segmented else units * UNIT_INPUTS
    if scales is not None and layer.segmented:
        # larger segments than the dense product takes are cut, and each piece gets the scale of the whole
        scales = scales.repeat_interleave(layer.segment // segment, dim=1)
    sums = x.new_empty((len(x), layer.rows * TILE_OUTPUTS), dtype=torch.float32)
    step = max(1, _LEVEL_BYTES // (units * UNIT_INPUTS * TILE_OUTPUTS))
    for first in range(0, layer.rows, step):
        rows = range(first, min(first + step, layer.rows))
        levels = x.new_empty((len(rows) * TILE_OUTPUTS, units * UNIT_INPUTS), dtype=torch.int8)
        many.levels(levels, layer.arranged, layer.bits, rows, range(units), units)
        part = sums[:, first * TILE_OUTPUTS : rows.stop * TILE_OUTPUTS]
        if not is_float:
            portable.dense(levels, values, scales, None, segment, out=part)
        elif x.dtype == torch.float32:
            torch.mm(values, levels.to(torch.float32).t(), out=part)
        else:
            # levels are exact in bfloat16, activations lose what they lose in a bfloat16 model; sums are float32
            part.copy_(torch.mm(values.to(torch.bfloat16), levels.to(torch.bfloat16).t(), out_dtype=torch.float32))
    return launches.finish(sums, None, layer.scale, layer.output_block, x.dtype)


def _portable(x: torch.Tensor, weight: torch.Tensor, layer: Layer, activations: str) -> torch.Tensor:
    values, scales = x.to(torch.float32), None
    if layer.input_scale is not None:
        values = portable.hadamard(values * layer.input_scale.to(torch.float32), layer.input_block)
    if activations == "int8":
        padded = torch.nn.functional.pad(values, (0, layer.padded_inputs - layer.inputs))
        values, scales = portable.round_activations(padded, layer.segment)
    if layer.code == "int8":
        return portable.dense(weight, values, scales, layer.scale.to(torch.float32), layer.inputs).to(x.dtype)
    split = (layer.scale, layer.offset) if layer.code == "split" else None
    segment = layer.segment if activations == "int8" or split else layer.padded_inputs
    y = portable.packed(weight, layer.table, (values.contiguous(), scales), layer.bits, layer.outputs, segment, split)
    if split is None:
        y = portable.hadamard(y, layer.output_block) * layer.scale.to(torch.float32)
    return y.to(x.dtype)


def dequantize(weight: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The weights a layer stands for: float32 [N, K]."""
    columns = torch.eye(layer.padded_inputs, dtype=torch.float32, device=weight.device)
    if layer.code == "int8":
        inner = weight.to(torch.float32)
    else:
        split = (layer.scale, layer.offset) if layer.code == "split" else None
        segment = layer.segment if split else layer.padded_inputs
        table = layer.table if layer.table is not None else portable.level_table(weight.device)
        inner = portable.packed(weight, table, (columns, None), layer.bits, layer.outputs, segment, split).t()[:, : layer.inputs]
    if layer.code == "split":
        return inner.contiguous()
    inner = portable.hadamard(inner.contiguous(), layer.input_block) * layer.input_scale.to(torch.float32)
    rotated = portable.hadamard(inner.t().contiguous(), layer.output_block)
    return (rotated * layer.scale.to(torch.float32)).t().contiguous()


def embedding(indices: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Rows of an int8 matrix, [count, K] in the dtype of `signs`; NaN for an index outside, since a GPU is not waited for.

    Args:
        indices: int32 or int64 [count].
        weight, weight_scale, signs, block: as in `septet::embedding`.
    """
    if _uses_cuda(weight.device) and block <= launches.LARGEST_BLOCK:
        parts = [launches.embed(part, weight, weight_scale, signs, block) for part in indices.contiguous().split(_LAUNCH_TOKENS)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    inside = (indices >= 0) & (indices < len(weight))
    row = indices.clamp(0, len(weight) - 1)
    scale = torch.where(inside, weight_scale[row].to(torch.float32), torch.nan)
    rotated = portable.hadamard(weight[row].to(torch.float32) * scale[:, None], block)
    return (rotated * signs.to(torch.float32)).to(signs.dtype)
