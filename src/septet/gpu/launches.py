"""The CUDA kernels launched on tensors: one function per kernel, tensors in, tensors out. Nothing waits for the GPU."""

from __future__ import annotations

import math

import torch

from septet.gpu import compiled
from septet.gpu.compiled import THREADS, activation_kernel, layer_kernel, product_kernel, workers_of
from septet.gpu.layout import UNIT_INPUTS, units_of
from septet.gpu.shares import CHUNK, GROUP_ROWS, OWN_INPUTS, blocks_of, plan

__all__ = [
    "LARGEST_BLOCK",
    "MOST_FLOAT_TOKENS",
    "MOST_TOKENS",
    "embed",
    "empty_slots",
    "finish",
    "product",
    "rotate",
    "takes_whole_layer",
    "whole_layer",
]

#: Tokens of one `product`, with int8 and with float activations.
MOST_TOKENS, MOST_FLOAT_TOKENS = 32, 16
#: Hadamard blocks up to this size are rotated by a block of threads.
LARGEST_BLOCK = 2048
#: Tokens of one `whole_layer`.
_LAYER_TOKENS = 2
#: Inputs whose products' sum is certain to be more than the least 32-bit integer, which stands for an empty word of a slot.
_MOST_INPUTS = 1 << 17
_EMPTY = -(1 << 31)


def _shift(segment: int | None) -> int:
    """log2 of the units of a segment, -1 for one segment."""
    return -1 if segment is None else (segment // UNIT_INPUTS).bit_length() - 1


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _normal(block: int) -> float:
    return 1 / math.sqrt(block)


def _each(block: int) -> int:
    return max(1, block // THREADS)


def rotate(x: torch.Tensor, input_scale: torch.Tensor, block: int, segmented: bool, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale, rotate and round activations.

    Args:
        x: [M, K], contiguous.
        input_scale: float16 [K].
        block: Hadamard block; with `segmented` at least 32.
        segmented: one scale per block instead of one per token.
        kind: "int8", "halves" (two float16 whose sum is the activation over its scale) or "float32" (neither rounded nor scaled).

    Returns:
        int8 [M, P], float16 [2, M, P] or float32 [M, P] with P = K rounded up to 64, zeros at the end, and scales float32
        [M, segments] or None.
    """
    device, (tokens, inputs) = x.device.index, x.shape
    padded, each, stream = units_of(inputs) * UNIT_INPUTS, _each(block), _stream(x.device.index)
    parts = blocks = -(-padded // (each * THREADS))
    segmented = segmented and kind != "float32"
    in_chunks = block <= CHUNK and inputs % 8 == 0
    if in_chunks:
        blocks = -(-padded // (THREADS // 32 * CHUNK))
        x = x if x.data_ptr() % 16 == 0 else x.clone()
    kernel = activation_kernel(device, "rotate_chunks" if in_chunks else "rotate", each, x.dtype)
    shape, dtype = {"int8": ((tokens, padded), torch.int8), "halves": ((2, tokens, padded), torch.float16)}.get(kind, (None, None))
    values = None if shape is None else x.new_empty(shape, dtype=dtype)
    to, scales = values, x.new_empty((tokens, inputs // block if segmented else parts), dtype=torch.float32)
    if not segmented:
        to = x.new_empty((tokens, padded), dtype=torch.float32)
    arguments = (inputs, padded, block, _normal(block), segmented, kind == "int8")
    kernel.launch((blocks, tokens), stream, x.data_ptr(), input_scale.data_ptr(), to.data_ptr(), scales.data_ptr(), *arguments)
    if kind == "float32":
        return to, None
    if not segmented:
        tops, scales = scales, x.new_empty((tokens, 1), dtype=torch.float32)
        pointers = to.data_ptr(), tops.data_ptr(), values.data_ptr(), scales.data_ptr()
        kernel = activation_kernel(device, "round_tokens", each, x.dtype)
        kernel.launch((-(-padded // 1024), tokens), stream, *pointers, parts, padded, kind == "int8")
    return values, scales


def product(
    arranged: torch.Tensor, bits: int, rows: int, values: torch.Tensor, scales: torch.Tensor, segment: int | None
) -> tuple[torch.Tensor, int]:
    """Partial sums of a few tokens.

    Args:
        arranged: from `layout.arrange`.
        bits: bits per pair.
        rows: of 64 outputs.
        values: int8 [M, P], M at most 32, or float16 [2, M, P], M at most 16, from `rotate`.
        scales: float32 [M, segments].
        segment: inputs that share a scale, 64 * 2^n; None for one per token, which is left to `finish`.

    Returns:
        int32 or float32 (with segments, or float16 values) [slots, M, 64] and the number of workers, for `finish`.
    """
    is_float = values.dtype == torch.float16
    tokens, padded = values.shape[-2:]
    units, device = padded // UNIT_INPUTS, values.device.index
    most = compiled.product_tokens(tokens)
    kernel, warps = product_kernel(device, bits, is_float, most), compiled.product_warps(most)
    workers = workers_of(device, rows * units, warps)
    dtype = torch.float32 if is_float or segment else torch.int32
    slots = values.new_empty((workers + rows, tokens, 64), dtype=dtype)
    pointers = arranged.data_ptr(), values.data_ptr(), scales.data_ptr(), slots.data_ptr()
    kernel.launch((-(-workers // warps), 1), _stream(device), *pointers, rows, units, tokens, workers, _shift(segment), 1)
    return slots, workers


def takes_whole_layer(tokens: int, inputs: int, outputs: int, blocks: tuple[int, int], device: int) -> bool:
    """Whether `whole_layer` can do it: few tokens, Hadamard blocks of at most 256, sums that 32-bit integers can hold."""
    fits = tokens <= _LAYER_TOKENS and max(blocks) <= CHUNK and inputs % 8 == 0 and inputs <= _MOST_INPUTS
    return fits and plan(tokens, inputs, outputs, device) is not None


def empty_slots(inputs: int, rows: int, device: torch.device) -> torch.Tensor:
    """Slots for `whole_layer`: int32, as many as it can need.

    Args:
        inputs: of the layer.
        rows: of 64 outputs.
        device: a GPU.
    """
    blocks = blocks_of(device.index, -(-rows // GROUP_ROWS) * units_of(inputs))
    return torch.full((blocks, _LAYER_TOKENS, CHUNK), _EMPTY, dtype=torch.int32, device=device)


def whole_layer(
    x: torch.Tensor,
    arranged: torch.Tensor,
    bits: int,
    scales: tuple[torch.Tensor, torch.Tensor],
    blocks: tuple[int, int],
    segment: int | None,
    slots: torch.Tensor,
) -> torch.Tensor:
    """A trellis layer with int8 activations in one launch.

    Args:
        x: [M, K], where `takes_whole_layer`.
        arranged: from `layout.arrange`.
        bits: bits per pair.
        scales: of inputs float16 [K], of outputs float16 [N].
        blocks: Hadamard blocks of inputs and outputs.
        segment: as for `product`.
        slots: from `empty_slots`. Two launches at the same time must not share them.

    Returns:
        [M, N].
    """
    device, (tokens, inputs), outputs = x.device.index, x.shape, len(scales[1])
    kind, blocks_of_threads, share = plan(tokens, inputs, outputs, device)
    values = activation_scales = None
    if segment is None and tokens * inputs > OWN_INPUTS:
        values, activation_scales = rotate(x, scales[0], blocks[0], False, "int8")
    elif x.data_ptr() % 16:
        x = x.clone()
    y = x.new_empty((tokens, outputs))
    pointers = (None if t is None else t.data_ptr() for t in (arranged, x, *scales, y, slots, values, activation_scales))
    sizes = inputs, outputs, units_of(inputs), -(-outputs // 64), tokens, _shift(segment), 1
    division = *share, -(-(1 << 32) // sizes[2]) & 0xFFFFFFFF
    arguments = compiled.LayerArguments(*pointers, *sizes, *blocks, *division, *(_normal(block) for block in blocks))
    kernel = layer_kernel(device, bits, x.dtype, kind, segment is not None)
    kernel.launch((blocks_of_threads, 1), _stream(device), arguments)
    return y


def finish(
    sums: torch.Tensor,
    scales: torch.Tensor | None,
    output_scale: torch.Tensor,
    block: int,
    dtype: torch.dtype,
    slots: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """Add slots, scale, rotate, scale.

    Args:
        sums: from `product` (then with `slots`) or a matrix [M, N or more], int32 or float32, rows contiguous.
        scales: float32 [M, 1], one per token, or None where the sums are scaled.
        output_scale: float16 [N].
        block: Hadamard block of the outputs.
        dtype: of the result.
        slots: (rows, units, workers) of `product`, or None.

    Returns:
        [M, N].
    """
    outputs, device, each = len(output_scale), sums.device.index, _each(block)
    tokens = sums.shape[1] if slots else len(sums)
    y = sums.new_empty((tokens, outputs), dtype=dtype)
    if slots is None and scales is None and sums.dtype == torch.float32 and block <= CHUNK and outputs % 8 == 0:
        kernel, blocks = activation_kernel(device, "finish_chunks", each, dtype), -(-outputs // (THREADS // 32 * CHUNK))
        pointers = sums.data_ptr(), output_scale.data_ptr(), y.data_ptr()
        kernel.launch((blocks, tokens), _stream(device), *pointers, outputs, block, _normal(block), sums.stride(0))
        return y
    rows, units, workers = slots or (0, 0, 0)
    kernel = activation_kernel(device, "finish", each, dtype)
    pointers = sums.data_ptr(), None if scales is None else scales.data_ptr(), output_scale.data_ptr(), y.data_ptr()
    numbers = sums.dtype == torch.int32, units, rows, workers, 0 if slots else sums.stride(0), scales is not None
    kernel.launch((-(-outputs // (each * THREADS)), tokens), _stream(device), *pointers, outputs, block, _normal(block), *numbers)
    return y


def embed(indices: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, signs: torch.Tensor, block: int) -> torch.Tensor:
    """Rows of an int8 matrix with their rotation undone: [count, K], the dtype of `signs`; NaN for an index outside.

    Args:
        indices: int32 or int64 [count], contiguous.
        weight: int8 [rows, K].
        weight_scale: float16 [rows].
        signs: [K].
        block: Hadamard block.
    """
    (rows, inputs), each, device = weight.shape, _each(block), weight.device.index
    y = signs.new_empty((len(indices), inputs))
    kernel = activation_kernel(device, "embedding", each, signs.dtype)
    pointers = (t.data_ptr() for t in (indices, weight, weight_scale, signs, y))
    numbers = indices.dtype == torch.int64, rows, inputs, block, _normal(block)
    kernel.launch((-(-inputs // (each * THREADS)), len(indices)), _stream(device), *pointers, *numbers)
    return y
