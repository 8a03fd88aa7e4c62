"""Products of many tokens on Hopper: levels are decoded a slab at a time, and multiplied by dense.cu.

A slab is some outputs and some inputs of the weights, such that its products fill the multiprocessors in whole waves, and is all
that is ever decoded at the same time. Results with int8 activations and one scale per token have the bits of the reference; with a
scale per block they are added in the reference's order, each by one fused multiply-add. Float activations of 16-bit models become
16-bit integers with a scale for each 256 inputs, which are two rows of int8.
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

#: What dense.cu and inputs.cu make of activations: int8 with several scales per token, int8 with one, int16 with several.
SEGMENTS, TOKEN, INT16 = 0, 1, 2
#: Of dense.cu: rows of a block of threads, outputs of two of them, inputs of a step, steps in flight.
_ROWS, _OUTPUTS, _STEP, _STAGES = 128, 256, 128, 6
_THREADS, _STAGE_BYTES = 384, 32 << 10
#: Of inputs.cu: threads of a block, inputs that one of them takes at a time.
_INPUT_THREADS, _THREAD_INPUTS = 256, 32
#: Hadamard blocks of outputs that dense.cu rotates, and of inputs that inputs.cu rotates.
_FUSED_BLOCK = 256
#: Levels of a slab that the L2 keeps, more or less, until they are multiplied. Where one wave of blocks reads all of them, memory keeps up
#: with slabs _LARGER times as large, if _SHARING rows of blocks read the same ones or the matrix has _MATRIX slabs: fewer launches, and no
#: sums between them. Measured on an H100.
_SLAB_BYTES, _SHARING, _MATRIX, _LARGER = 32 << 20, 4, 2, 4
#: What `plan` weighs, in microseconds, measured on an H100: a step of all blocks, two launches; and bytes of sums moved in one.
_STEP_TIME, _LAUNCHES_TIME, _CARRY_RATE = 0.43, 8.0, 4e6
_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class Slab(NamedTuple):
    """Outputs and inputs of the weights that are decoded at a time."""

    outputs: int
    inputs: int


class _Arguments(ctypes.Structure):
    """DenseArguments of dense.cu, which begins at a multiple of 64 bytes and ends at one."""

    _fields_ = [
        ("tokens_map", TensorMap),
        *((name, _P) for name in ("levels", "scales", "output_scale", "y", "carry_in", "carry_out")),
        *((name, _I) for name in ("tokens", "outputs", "steps", "first_step", "segment_steps")),
        *((name, _I) for name in ("scale_columns", "y_columns", "carry_columns", "output_block")),
        ("normal", _F),
        ("padding", ctypes.c_byte * 40),
    ]


def dense_source(mode: int, dtype: torch.dtype) -> str:
    """dense.cu for a mode and the dtype of the result."""
    return source_of("values.cu", "launch.cu", "dense.cu", MODE=mode, STAGES=_STAGES, DTYPE=DTYPES[dtype])


@cache
def _dense_kernel(device: int, mode: int, dtype: torch.dtype) -> Kernel:
    image = compile_source(dense_source(mode, dtype), ("--gpu-architecture=sm_90a", "--std=c++17"))
    return load_kernel(image, "dense", (_Arguments,), _THREADS, _STAGES * (_STAGE_BYTES + 16) + 16 + 1024)


def inputs_source(mode: int, dtype: torch.dtype, whole: bool) -> str:
    """inputs.cu for a mode, the dtype of the inputs, and blocks of 256 of them or smaller ones."""
    return source_of("values.cu", "inputs.cu", MODE=mode, WHOLE=int(whole), DTYPE=DTYPES[dtype])


@cache
def _inputs_kernel(device: int, mode: int, dtype: torch.dtype, whole: bool) -> Kernel:
    image = compile_source(inputs_source(mode, dtype, whole), ("--gpu-architecture=sm_90", "--std=c++17"))
    return load_kernel(image, "token_inputs", (_P, _P, _P, _P, _I, _I, _I, _F), _INPUT_THREADS)


@cache
def _is_hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def takes(layer: Layer, x: torch.Tensor, activations: str) -> bool:
    """Whether `linear` computes these products; float activations of float32 models are not rounded to 16 bits."""
    if activations == "float":
        fits = x.dtype != torch.float32 and _rotates(layer)
    else:
        fits = not layer.segmented or layer.segment % _STEP == 0
    return fits and layer.outputs % 8 == 0 and _is_hopper(x.device.index)


def _rotates(layer: Layer) -> bool:
    """Whether inputs.cu rotates the inputs."""
    return layer.input_block <= _FUSED_BLOCK and layer.inputs % 8 == 0


@cache
def plan(inputs: int, outputs: int, rows: int, quantum: int, processors: int) -> Slab:
    """The slab that takes the least time by a simple count.

    Args:
        inputs, outputs: of the product, inputs in whole units.
        rows: of int8, one or two for a token.
        quantum: inputs that must not be cut.
        processors: multiprocessors.
    """
    across, down, wave = -(-outputs // _OUTPUTS), -(-rows // _ROWS), processors // 2
    larger = down >= _SHARING or inputs * outputs >= _MATRIX * _SLAB_BYTES
    best = math.inf, Slab(outputs, inputs)
    for pairs in range(1, across + 1):
        slab_bytes = _SLAB_BYTES * (_LARGER if larger and pairs * down <= wave else 1)
        slab_inputs = min(inputs, max(1, slab_bytes // (pairs * _OUTPUTS * quantum)) * quantum)
        # slabs along the inputs of equal size
        cuts = -(-inputs // slab_inputs)
        slab_inputs = -(-inputs // cuts // quantum) * quantum
        whole, rest = divmod(across, pairs)
        waves = whole * -(-pairs * down // wave) + -(-rest * down // wave)
        time = waves * inputs / _STEP * _STEP_TIME + (whole + (rest > 0)) * cuts * _LAUNCHES_TIME
        time += (cuts - 1) * rows * outputs * 8 / _CARRY_RATE
        best = min(best, (time, Slab(pairs * _OUTPUTS, slab_inputs)))
    return best[1]


def levels(to: torch.Tensor, arranged: torch.Tensor, bits: int, rows: range, units: range, row_units: int, for_dense: bool = False) -> None:
    """Decode some rows of tiles.

    Args:
        to: int8 [len(rows) * 64, len(units) * 64], or as many numbers with both rounded up to 128.
        arranged: from `layout.arrange`.
        bits: bits per pair.
        rows: of tiles.
        units: along the inputs.
        row_units: units of a whole row.
        for_dense: in the order in which dense.cu reads them, instead of a plain matrix.
    """
    device, count = to.device.index, len(rows) * len(units)
    kernel, workers = levels_kernel(device, bits, for_dense), compiled.workers_of(device, count)
    start = arranged.data_ptr() + rows.start * row_units * UNIT_INPUTS * 4 * bits
    sizes = len(rows), row_units, units.start, len(units), 1
    kernel.launch((-(-workers // WARPS), 1), _stream(device), start, to.data_ptr(), *sizes)


def _inputs(x: torch.Tensor, layer: Layer, mode: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated inputs as rows for dense.cu, int8 [rows, P], and their scales."""
    (tokens, inputs), device, block = x.shape, x.device.index, layer.input_block
    if not _rotates(layer):
        return launches.rotate(x, layer.input_scale, block, mode == SEGMENTS, "int8")
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    padded = units_of(inputs) * UNIT_INPUTS
    scales = {SEGMENTS: inputs // block, TOKEN: 1, INT16: -(-inputs // _FUSED_BLOCK)}[mode]
    values = x.new_empty((-(-tokens // 8) * 16 if mode == INT16 else tokens, padded), dtype=torch.int8)
    scales = x.new_empty((tokens, scales), dtype=torch.float32)
    pointers = (t.data_ptr() for t in (x, layer.input_scale, values, scales))
    parts = 1 if mode == TOKEN else -(-padded // (_INPUT_THREADS * _THREAD_INPUTS))
    kernel = _inputs_kernel(device, mode, x.dtype, block == _FUSED_BLOCK)
    kernel.launch((tokens, parts), _stream(device), *pointers, inputs, padded, block, 1 / math.sqrt(block))
    return values, scales


class _Product(NamedTuple):
    """What the launches of one product share; `sums` are between them or, without `y`, the result."""

    mode: int
    tokens: int
    values: torch.Tensor
    scales: torch.Tensor
    segment: int
    slab: Slab
    levels: torch.Tensor
    sums: torch.Tensor | None
    y: torch.Tensor | None


def _product(x: torch.Tensor, layer: Layer, mode: int) -> _Product:
    """Inputs, and memory for the rest."""
    device, tokens = x.device.index, len(x)
    values, scales = _inputs(x, layer, mode)
    rows, padded = values.shape
    segment = {SEGMENTS: layer.segment, TOKEN: padded, INT16: _FUSED_BLOCK}[mode]
    quantum = _STEP if mode == TOKEN else segment
    slab = plan(padded, layer.outputs, rows, quantum, torch.cuda.get_device_properties(device).multi_processor_count)
    fused = layer.output_block <= _FUSED_BLOCK
    sums = None
    if not fused or slab.inputs < padded:
        shape = tokens, slab.outputs if fused else layer.outputs
        sums = x.new_empty(shape, dtype=torch.int32 if mode == TOKEN else torch.float32)
    y = x.new_empty((tokens, layer.outputs)) if fused else None
    levels = x.new_empty(slab.outputs * -(-slab.inputs // _STEP) * _STEP, dtype=torch.int8)
    return _Product(mode, tokens, values, scales, segment, slab, levels, sums, y)


def _arguments(layer: Layer, product: _Product, tokens_map: TensorMap, first: int, begin: int) -> _Arguments:
    """Of the launch for outputs `first` .. and inputs `begin` .. ."""
    slab, padded, scales, sums, y = product.slab, product.values.shape[1], product.scales, product.sums, product.y
    outputs, inputs = min(slab.outputs, layer.outputs - first), min(slab.inputs, padded - begin)
    carry = None if sums is None else sums.data_ptr() + (first * 4 if y is None else 0)
    return _Arguments(
        tokens_map,
        product.levels.data_ptr(),
        scales.data_ptr() + begin // product.segment * 4,
        layer.scale.data_ptr() + first * layer.scale.element_size(),
        None if y is None else y.data_ptr() + first * y.element_size(),
        carry if begin else None,
        None if y is not None and begin + inputs == padded else carry,
        product.tokens,
        outputs,
        -(-inputs // _STEP),
        begin // _STEP,
        -(-product.segment // _STEP),
        scales.shape[1],
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
    mode, device = INT16 if activations == "float" else SEGMENTS if layer.segmented else TOKEN, x.device.index
    product = _product(x, layer, mode)
    (rows, padded), slab = product.values.shape, product.slab
    tokens_map = tensor_map(product.values.data_ptr(), rows, padded, _ROWS // 2)
    kernel = _dense_kernel(device, mode, x.dtype)
    for first in range(0, layer.outputs, slab.outputs):
        outputs = min(slab.outputs, layer.outputs - first)
        tiles = range(first // TILE_OUTPUTS, -(-(first + outputs) // TILE_OUTPUTS))
        for begin in range(0, padded, slab.inputs):
            units = range(begin // UNIT_INPUTS, min(padded, begin + slab.inputs) // UNIT_INPUTS)
            levels(product.levels, layer.arranged, layer.bits, tiles, units, padded // UNIT_INPUTS, for_dense=True)
            grid = 2 * -(-outputs // _OUTPUTS), -(-rows // _ROWS)
            kernel.launch(grid, _stream(device), _arguments(layer, product, tokens_map, first, begin))
    if product.y is not None:
        return product.y
    return launches.finish(product.sums, product.scales if mode == TOKEN else None, layer.scale, layer.output_block, x.dtype)
