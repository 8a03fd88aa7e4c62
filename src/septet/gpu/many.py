"""Products of many tokens on Hopper: levels decoded a slab at a time into the L2, and multiplied there by dense.cu.

A slab is some outputs and some inputs of the weights. It is as large as what the L2 keeps until it has been multiplied, and its
products fill the multiprocessors in whole waves. Results with int8 activations have the bits of the reference.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from septet.codes.tile import TILE_OUTPUTS
from septet.gpu import compiled, launches
from septet.gpu.compiled import DTYPES, WARPS, levels_kernel, source_of
from septet.gpu.driver import Kernel, TensorMap, compile_source, load_kernel, tensor_map
from septet.gpu.layout import UNIT_INPUTS, units_of

if TYPE_CHECKING:
    from septet.gpu.layers import Layer

__all__ = ["Slab", "dense_source", "inputs_source", "levels", "linear", "plan", "takes"]

#: Of dense.cu: tokens of a block of threads, outputs of two of them, bytes of a step along the inputs, steps in flight.
_TOKENS, _OUTPUTS, _STEP, _STAGES = 128, 256, 128, 6
_THREADS, _STAGE_BYTES = 288, 32 << 10
_INPUT_THREADS = 256
#: Hadamard blocks of outputs that dense.cu rotates, and of inputs that inputs.cu rotates.
_FUSED_BLOCK = 256
#: Levels of a slab, so that they stay in the 50 MB of an H100's L2.
_SLAB_BYTES = 32 << 20
#: What `plan` weighs, in microseconds, measured on an H100: a step of all blocks, two launches; and bytes of sums moved in one.
_STEP_TIME, _LAUNCHES_TIME, _CARRY_RATE = 0.36, 4.0, 4e6
_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class Slab(NamedTuple):
    """Outputs and inputs of the weights that are decoded at a time."""

    outputs: int
    inputs: int


class _Arguments(ctypes.Structure):
    """DenseArguments of dense.cu, which begins at a multiple of 64 bytes and ends at one."""

    _fields_ = [
        ("tokens_map", TensorMap),
        ("levels_map", TensorMap),
        *((name, _P) for name in ("scales", "output_scale", "y", "carry_in", "carry_out")),
        *((name, _I) for name in ("tokens", "outputs", "steps", "first_step", "segment_steps")),
        *((name, _I) for name in ("scale_columns", "y_columns", "carry_columns", "output_block")),
        ("normal", _F),
        ("padding", ctypes.c_byte * 48),
    ]


def dense_source(mode: int, dtype: torch.dtype, sharing: int) -> str:
    """dense.cu for int8 with segments (0), int8 with one scale per token (1) or bfloat16 (2), the dtype of the result, and CLUSTER_TOKENS."""
    macros = {"MODE": mode, "STAGES": _STAGES, "ORDERED": int(mode == 0), "DTYPE": DTYPES[dtype], "CLUSTER_TOKENS": sharing}
    return source_of("values.cu", "dense.cu", **macros)


@cache
def _dense_kernel(device: int, mode: int, dtype: torch.dtype, sharing: int) -> Kernel:
    image = compile_source(dense_source(mode, dtype, sharing), ("--gpu-architecture=sm_90a", "--std=c++17"))
    return load_kernel(image, "dense", (_Arguments,), _THREADS, _STAGES * (_STAGE_BYTES + 16) + 1024)


def inputs_source(mode: int, dtype: torch.dtype) -> str:
    """inputs.cu for a mode as of `dense_source` and the dtype of the inputs."""
    return source_of("values.cu", "inputs.cu", MODE=mode, DTYPE=DTYPES[dtype])


@cache
def _inputs_kernel(device: int, mode: int, dtype: torch.dtype) -> Kernel:
    image = compile_source(inputs_source(mode, dtype), ("--gpu-architecture=sm_90", "--std=c++17"))
    return load_kernel(image, "token_inputs", (_P, _P, _P, _P, _I, _I, _I, _F), _INPUT_THREADS)


@cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def takes(layer: Layer, x: torch.Tensor, activations: str) -> bool:
    """Whether `linear` computes these products; float activations of float32 models are not rounded to bfloat16."""
    if activations == "float" and x.dtype == torch.float32:
        return False
    cut = activations == "float" or not layer.segmented or layer.segment % _STEP == 0
    return cut and layer.outputs % 8 == 0 and _is_hopper(x.device.index)


@cache
def plan(inputs: int, outputs: int, tokens: int, width: int, quantum: int, processors: int) -> Slab:
    """The slab that takes the least time by a simple count.

    Args:
        inputs, outputs, tokens: of the product, inputs in whole units.
        width: bytes of a level.
        quantum: inputs that must not be cut.
        processors: multiprocessors.
    """
    across, down, wave = -(-outputs // _OUTPUTS), -(-tokens // _TOKENS), processors // 2
    best = math.inf, Slab(outputs, inputs)
    for pairs in range(1, across + 1):
        slab_inputs = min(inputs, max(1, _SLAB_BYTES // (pairs * _OUTPUTS * width * quantum)) * quantum)
        # slabs along the inputs of equal size
        cuts = -(-inputs // slab_inputs)
        slab_inputs = -(-inputs // cuts // quantum) * quantum
        whole, rest = divmod(across, pairs)
        waves = whole * -(-pairs * down // wave) + -(-rest * down // wave)
        time = waves * inputs * width / _STEP * _STEP_TIME + (whole + (rest > 0)) * cuts * _LAUNCHES_TIME
        time += (cuts - 1) * tokens * outputs * 8 / _CARRY_RATE
        best = min(best, (time, Slab(pairs * _OUTPUTS, slab_inputs)))
    return best[1]


def levels(to: torch.Tensor, arranged: torch.Tensor, bits: int, rows: range, units: range, row_units: int) -> None:
    """Decode some rows of tiles.

    Args:
        to: int8 or bfloat16 [len(rows) * 64, len(units) * 64].
        arranged: from `layout.arrange`.
        bits: bits per pair.
        rows: of tiles.
        units: along the inputs.
        row_units: units of a whole row.
    """
    device, count = to.device.index, len(rows) * len(units)
    kernel, workers = levels_kernel(device, bits, to.dtype == torch.bfloat16), compiled.workers_of(device, count)
    start = arranged.data_ptr() + rows.start * row_units * UNIT_INPUTS * 4 * bits
    sizes = len(rows), row_units, units.start, len(units), 1
    kernel.launch((-(-workers // WARPS), 1), _stream(device), start, to.data_ptr(), *sizes)


def _inputs(x: torch.Tensor, layer: Layer, mode: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotated inputs, int8 or bfloat16 [M, P], and their scales."""
    (tokens, inputs), device, block = x.shape, x.device.index, layer.input_block
    if block > _FUSED_BLOCK or inputs % 8:
        values, scales = launches.rotate(x, layer.input_scale, block, mode == 0, "float32" if mode == 2 else "int8")
        return values.to(torch.bfloat16) if mode == 2 else values, scales
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    padded = units_of(inputs) * UNIT_INPUTS
    values = x.new_empty((tokens, padded), dtype=torch.bfloat16 if mode == 2 else torch.int8)
    scales = None if mode == 2 else x.new_empty((tokens, inputs // block if mode == 0 else 1), dtype=torch.float32)
    pointers = x.data_ptr(), layer.input_scale.data_ptr(), values.data_ptr(), None if scales is None else scales.data_ptr()
    _inputs_kernel(device, mode, x.dtype).launch((tokens, 1), _stream(device), *pointers, inputs, padded, block, 1 / math.sqrt(block))
    return values, scales


class _Product(NamedTuple):
    """What the launches of one product share."""

    values: torch.Tensor
    scales: torch.Tensor | None
    tokens_map: TensorMap
    buffer: torch.Tensor
    sums: torch.Tensor | None
    y: torch.Tensor | None
    sharing: int


def _arguments(layer: Layer, product: _Product, slab: Slab, first: int, begin: int) -> _Arguments:
    """Of the launch for outputs `first` .. and inputs `begin` .. ."""
    (tokens, padded), width = product.values.shape, product.values.element_size()
    outputs, inputs = min(slab.outputs, layer.outputs - first), min(slab.inputs, padded - begin)
    scales, sums, y = product.scales, product.sums, product.y
    by_segment = scales is not None and layer.segmented
    carry = None if sums is None else sums.data_ptr() + (first * 4 if y is None else 0)
    return _Arguments(
        product.tokens_map,
        tensor_map(product.buffer.data_ptr(), -(-outputs // TILE_OUTPUTS) * TILE_OUTPUTS, inputs * width, _OUTPUTS // 2 // product.sharing),
        None if scales is None else scales.data_ptr() + (begin // layer.segment * 4 if by_segment else 0),
        layer.scale.data_ptr() + first * layer.scale.element_size(),
        None if y is None else y.data_ptr() + first * y.element_size(),
        carry if begin else None,
        None if y is not None and begin + inputs == padded else carry,
        tokens,
        outputs,
        -(-inputs * width // _STEP),
        begin * width // _STEP,
        layer.segment // _STEP if by_segment else 1 << 30,
        1 if scales is None else scales.shape[1],
        layer.outputs,
        0 if sums is None else sums.shape[1],
        layer.output_block,
        1 / math.sqrt(layer.output_block),
    )


def linear(x: torch.Tensor, layer: Layer, activations: str) -> torch.Tensor:
    """A whole trellis layer, where `takes`.

    Args:
        x: float32, bfloat16 or float16 [M, K], contiguous.
        layer: with `arranged`.
        activations: "int8" or "float".

    Returns:
        [M, N], the dtype of `x`.
    """
    mode, device = 2 if activations == "float" else 0 if layer.segmented else 1, x.device.index
    values, scales = _inputs(x, layer, mode)
    (tokens, padded), width = values.shape, values.element_size()
    quantum = layer.segment if mode == 0 else _STEP
    slab = plan(padded, layer.outputs, tokens, width, quantum, torch.cuda.get_device_properties(device).multi_processor_count)
    fused = layer.output_block <= _FUSED_BLOCK
    sums = y = None
    if fused:
        y = x.new_empty((tokens, layer.outputs))
    if not fused or slab.inputs < padded:
        sums = x.new_empty((tokens, slab.outputs if fused else layer.outputs), dtype=torch.int32 if mode == 1 else torch.float32)
    sharing = 1 + (tokens > _TOKENS)
    tokens_map = tensor_map(values.data_ptr(), tokens, padded * width, _TOKENS // 2)
    product = _Product(values, scales, tokens_map, x.new_empty(slab.outputs * slab.inputs, dtype=values.dtype), sums, y, sharing)
    kernel = _dense_kernel(device, mode, x.dtype, sharing)
    for first in range(0, layer.outputs, slab.outputs):
        outputs = min(slab.outputs, layer.outputs - first)
        rows = range(first // TILE_OUTPUTS, -(-(first + outputs) // TILE_OUTPUTS))
        for begin in range(0, padded, slab.inputs):
            units = range(begin // UNIT_INPUTS, min(padded, begin + slab.inputs) // UNIT_INPUTS)
            levels(product.buffer, layer.arranged, layer.bits, rows, units, padded // UNIT_INPUTS)
            grid = 2 * -(-outputs // _OUTPUTS), -(-tokens // (_TOKENS * sharing)) * sharing
            kernel.launch(grid, _stream(device), _arguments(layer, product, slab, first, begin))
    return y if fused else launches.finish(sums, scales if mode == 1 else None, layer.scale, layer.output_block, x.dtype)
