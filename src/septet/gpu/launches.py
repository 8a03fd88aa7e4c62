"""The CUDA kernels, compiled for the device at hand and launched on tensors: one function per kernel, shapes in, tensors out.

Sources are product.cu and activations.cu beside this file. Each variant is compiled once per process, in about a second.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from pathlib import Path

import torch

from septet.codes.trellis import LEVEL_TABLE, WIDTHS
from septet.gpu.driver import Kernel, compile_source, load_kernel
from septet.gpu.layout import UNIT_INPUTS, units_of

__all__ = ["LARGEST_BLOCK", "MOST_TOKENS", "embed", "finish", "levels", "product", "rotate", "source_of"]

#: Tokens of one `product`.
MOST_TOKENS = 16
#: Hadamard blocks up to this size are rotated by a block of threads.
LARGEST_BLOCK = 2048
_THREADS = 256
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_TABLE_BYTES = 64 << 10
#: Warps of a block of `product` and blocks on a multiprocessor, by (float, tokens > 8): what registers allow.
_SHAPES = {(False, False): (16, 1), (False, True): (16, 1), (True, False): (16, 1), (True, True): (12, 1)}
_HASH = 2
_P, _I, _U, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint, ctypes.c_float
_PARAMETERS = {
    "product": (_P, _P, _P, _P, _I, _I, _I, _I, _I, _U),
    "levels": (_P, _P, _I, _I, _U),
    "rotate": (_P, _P, _P, _P, _I, _I, _I, _F, _I, _I),
    "round_tokens": (_P, _P, _P, _P, _I, _I, _I),
    "finish": (_P, _P, _P, _P, _I, _I, _F, _I, _I, _I, _I, _I, _I),
    "embedding": (_P, _P, _P, _P, _P, _I, _I, _I, _I, _F),
}


def source_of(file: str, **macros: object) -> str:
    """A kernel file with its macros defined.

    Args:
        file: product.cu or activations.cu.
        macros: name -> value.
    """
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, (Path(__file__).parent / file).read_text()])


def product_source(bits: int, is_float: bool, many: bool, warps: int, blocks: int, hashing: int = _HASH) -> str:
    """product.cu for a width, kind of activations and number of tokens."""
    return source_of(
        "product.cu",
        BITS=bits,
        MULTIPLIER=f"{WIDTHS[bits].multiplier}u",
        LEVELS=",".join(map(str, LEVEL_TABLE)),
        FLOAT=int(is_float),
        TILES_OF_8=1 + many,
        WARPS=warps,
        BLOCKS_PER_SM=blocks,
        HASH=hashing,
    )


@cache
def _architecture(device: int) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"--gpu-architecture=sm_{major}{minor}"


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _product_kernel(device: int, name: str, bits: int, is_float: bool, many: bool) -> tuple[Kernel, int]:
    """The kernel and how many warps of it work at the same time."""
    warps, blocks = _SHAPES[is_float, many]
    image = compile_source(product_source(bits, is_float, many, warps, blocks), (_architecture(device), "--std=c++17"))
    return load_kernel(image, name, _PARAMETERS[name], 32 * warps, _TABLE_BYTES), blocks * _processors(device)


@cache
def _activation_kernel(device: int, name: str, each: int, dtype: torch.dtype) -> Kernel:
    source = source_of("activations.cu", E=each, DTYPE=_DTYPES[dtype])
    return load_kernel(compile_source(source, (_architecture(device), "--std=c++17")), name, _PARAMETERS[name], _THREADS)


def _stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _normal(block: int) -> float:
    return 1 / math.sqrt(block)


def _each(block: int) -> int:
    return max(1, block // _THREADS)


def rotate(
    x: torch.Tensor, input_scale: torch.Tensor, block: int, segmented: bool, kind: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
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
    parts = -(-padded // (each * _THREADS))
    segmented = segmented and kind != "float32"
    kernel = _activation_kernel(device, "rotate", each, x.dtype)
    shape, dtype = {"int8": ((tokens, padded), torch.int8), "halves": ((2, tokens, padded), torch.float16)}.get(kind, (None, None))
    values = None if shape is None else x.new_empty(shape, dtype=dtype)
    to, scales = values, x.new_empty((tokens, inputs // block if segmented else parts), dtype=torch.float32)
    if not segmented:
        to = x.new_empty((tokens, padded), dtype=torch.float32)
    arguments = (inputs, padded, block, _normal(block), segmented, kind == "int8")
    kernel.launch((parts, tokens), stream, x.data_ptr(), input_scale.data_ptr(), to.data_ptr(), scales.data_ptr(), *arguments)
    if kind == "float32":
        return to, None
    if not segmented:
        tops, scales = scales, x.new_empty((tokens, 1), dtype=torch.float32)
        pointers = to.data_ptr(), tops.data_ptr(), values.data_ptr(), scales.data_ptr()
        kernel = _activation_kernel(device, "round_tokens", each, x.dtype)
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
        values: int8 [M, P] or float16 [2, M, P] from `rotate`, M at most 16.
        scales: float32 [M, segments].
        segment: inputs that share a scale, 64 * 2^n; None for one per token, which is left to `finish`.

    Returns:
        int32 or float32 (with segments, or float16 values) [slots, M, 64] and the number of workers, for `finish`.
    """
    is_float = values.dtype == torch.float16
    tokens, padded = values.shape[-2:]
    units, device = padded // UNIT_INPUTS, values.device.index
    kernel, blocks = _product_kernel(device, "product", bits, is_float, tokens > 8)
    warps = _SHAPES[is_float, tokens > 8][0]
    workers = min(blocks * warps, rows * units)
    dtype = torch.float32 if is_float or segment else torch.int32
    slots = values.new_empty((workers + rows, tokens, 64), dtype=dtype)
    shift = -1 if segment is None else (segment // UNIT_INPUTS).bit_length() - 1
    pointers = arranged.data_ptr(), values.data_ptr(), scales.data_ptr(), slots.data_ptr()
    kernel.launch((-(-workers // warps), 1), _stream(device), *pointers, rows, units, tokens, workers, shift, 1 << 16)
    return slots, workers


def levels(arranged: torch.Tensor, bits: int, rows: int, units: int) -> torch.Tensor:
    """Levels of packed weights: int8 [rows * 64, units * 64]."""
    device = arranged.device.index
    to = arranged.new_empty((rows * 64, units * UNIT_INPUTS), dtype=torch.int8)
    kernel, blocks = _product_kernel(device, "levels", bits, False, False)
    warps = _SHAPES[False, False][0]
    blocks = min(blocks, -(-rows * units // warps))
    kernel.launch((blocks, 1), _stream(device), arranged.data_ptr(), to.data_ptr(), rows, units, 1 << 16)
    return to


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
    rows, units, workers = slots or (0, 0, 0)
    kernel = _activation_kernel(device, "finish", each, dtype)
    pointers = sums.data_ptr(), None if scales is None else scales.data_ptr(), output_scale.data_ptr(), y.data_ptr()
    numbers = sums.dtype == torch.int32, units, rows, workers, 0 if slots else sums.stride(0), scales is not None
    kernel.launch((-(-outputs // (each * _THREADS)), tokens), _stream(device), *pointers, outputs, block, _normal(block), *numbers)
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
    kernel = _activation_kernel(device, "embedding", each, signs.dtype)
    pointers = (t.data_ptr() for t in (indices, weight, weight_scale, signs, y))
    numbers = indices.dtype == torch.int64, rows, inputs, block, _normal(block)
    kernel.launch((-(-inputs // (each * _THREADS)), len(indices)), _stream(device), *pointers, *numbers)
    return y
