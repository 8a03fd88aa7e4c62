"""The CUDA kernels, compiled for the device at hand: one variant for each width, dtype and number of tokens that differ in their code.

Sources lie beside this file. Each variant is compiled once per process, in a second or two.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from septet.codes.trellis import LEVEL_TABLE, WIDTHS
from septet.gpu.driver import Kernel, compile_source, load_kernel, shared_memory

__all__ = [
    "DTYPES",
    "INPUT_BYTES",
    "LARGE",
    "SMALL",
    "SMALLEST",
    "THREADS",
    "TOKEN_WARPS",
    "WARPS",
    "LayerArguments",
    "LayerKind",
    "activation_kernel",
    "fits",
    "layer_kernel",
    "layer_source",
    "levels_kernel",
    "options_of",
    "product_kernel",
    "product_tokens",
    "product_warps",
    "processors_of",
    "source_of",
    "token_kernel",
    "token_source",
    "trellis_source",
    "workers_of",
]

#: Threads of the kernels of activations.cu.
THREADS = 256
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
#: Of the level tables of two places.
_TABLE_BYTES = 64 << 10
#: Where tables begin in shared memory; what lies below, but for the first KiB, is for inputs and sums.
_TABLE_AT = 64 << 10
INPUT_BYTES = 63 << 10
#: Warps of a block, one of which fills a multiprocessor: 128 registers a thread.
WARPS = 16
#: The same of token.cu, with 168 registers: a warp keeps a decoded unit there while it waits.
TOKEN_WARPS = 12
#: Bytes of a decoded unit. So many lie in the gaps of the table with one place, the others behind the tables; those of token.cu all behind.
_UNIT_BYTES, _GAPS, _TOKEN_STORED = 4 << 10, 8, 8
#: The same of `product` for so many tokens at most, with 128, 168 and 255 registers.
_PRODUCT_WARPS = {8: WARPS, 16: 12, 32: 8}
_P, _I, _F = ctypes.c_void_p, ctypes.c_int, ctypes.c_float


class LayerArguments(ctypes.Structure):
    """LayerArguments of columns.cu."""

    _fields_ = [
        *((name, _P) for name in ("weights", "x", "input_scale", "output_scale", "y", "slots", "values", "scales")),
        *((name, _I) for name in ("inputs", "outputs", "units", "rows", "tokens", "segment_shift", "one")),
        *((name, _I) for name in ("input_block", "output_block")),
        *((name, ctypes.c_uint32) for name in ("each", "more", "late", "less", "part")),
        *((name, _F) for name in ("input_normal", "output_normal")),
    ]


class LayerKind(NamedTuple):
    """Variants of layer.cu.

    Args:
        warps: of a block, 8 or 16.
        blocks: that a multiprocessor has room for; a launch has one, the other is of the next.
        places: as in decode.cu, if the device has the shared memory.
        table_at: where tables begin in shared memory.
        stored: units of a warp that are decoded into it before inputs are waited for; if any, one more is in registers.
        decodes_all: these and a second one in registers are all units of a warp, of one token; other inputs than the block's have no room.
    """

    warps: int
    blocks: int
    places: int
    table_at: int
    stored: int
    decodes_all: bool = False

    @property
    def units(self) -> int:
        """Units of a block that are decoded before inputs are waited for."""
        return self.warps * (self.stored + (self.stored > 0) + self.decodes_all)

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block, with `places` tables, but for the first KiB, which is not the block's."""
        behind = _UNIT_BYTES * max(0, self.stored * self.warps - _GAPS)
        return self.table_at + _TABLE_BYTES * max(1, self.places // 2) + behind - 1024

    @property
    def room(self) -> int:
        """Bytes for inputs and sums: what lies below the tables, but for the first KiB."""
        return self.table_at - 1024


LARGE = LayerKind(WARPS, 1, 4, _TABLE_AT, 0)
SMALL = LayerKind(8, 2, 1, 16 << 10, 2)
SMALLEST = LayerKind(8, 2, 1, 2 << 10, 2, decodes_all=True)
_PARAMETERS = {
    "product": (_P, _P, _P, _P, _I, _I, _I, _I, _I, _I),
    "levels": (_P, _P, _I, _I, _I, _I, _I),
    "rotate": (_P, _P, _P, _P, _I, _I, _I, _F, _I, _I),
    "rotate_chunks": (_P, _P, _P, _P, _I, _I, _I, _F, _I, _I),
    "round_tokens": (_P, _P, _P, _P, _I, _I, _I),
    "finish": (_P, _P, _P, _P, _I, _I, _F, _I, _I, _I, _I, _I, _I),
    "finish_chunks": (_P, _P, _P, _I, _I, _F, _I),
    "embedding": (_P, _P, _P, _P, _P, _I, _I, _I, _I, _F),
}


def product_tokens(tokens: int) -> int:
    """The most tokens, 8, 16 or 32, of the variant of `product` that takes so many."""
    return next(most for most in _PRODUCT_WARPS if tokens <= most)


def product_warps(tokens: int) -> int:
    """Warps of a block of `product`, for one of its numbers of tokens."""
    return _PRODUCT_WARPS[tokens]


def source_of(*files: str, **macros: object) -> str:
    """Kernel files, one after the other, with their macros defined.

    Args:
        files: names of the .cu files beside this one.
        macros: name -> value.
    """
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, *((Path(__file__).parent / file).read_text() for file in files)])


def trellis_source(*files: str, bits: int, is_float: bool = False, tokens: int = 8, places: int = 4, dtype: int = 0, **more: int) -> str:
    """decode.cu for a width, kind of activations and number of tokens, and the files that build on it; `more` macros may replace others."""
    macros = {"MULTIPLIER": f"{WIDTHS[bits].multiplier}u", "LEVELS": ",".join(map(str, LEVEL_TABLE)), "DTYPE": dtype}
    macros |= {"BITS": bits, "FLOAT": int(is_float), "TILES_OF_8": tokens // 8, "WARPS": product_warps(tokens), "PLACES": places}
    macros |= {"TABLE_AT": _TABLE_AT}
    return source_of("launch.cu", "decode.cu", *files, **(macros | more))


@cache
def processors_of(device: int) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def options_of(device: int) -> tuple[str, ...]:
    """NVRTC's options for a device."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"


@cache
def _places(device: int) -> int:
    """How many places of an operand have a table of their own."""
    return 4 if shared_memory(device) >= _TABLE_AT + 2 * _TABLE_BYTES else 2


def fits(device: int) -> bool:
    """Whether a block of threads can have shared memory for the tables; otherwise nothing but rotations can run."""
    return shared_memory(device) >= _TABLE_AT + _TABLE_BYTES


@cache
def product_kernel(device: int, bits: int, is_float: bool, tokens: int) -> Kernel:
    """The kernel of product.cu.

    Args:
        device: a GPU's index.
        bits: bits per pair.
        is_float: activations are pairs of float16, not int8.
        tokens: at most so many, from `product_tokens`; 32 only with int8.
    """
    places = 2 if is_float else _places(device)
    source = trellis_source("product.cu", bits=bits, is_float=is_float, tokens=tokens, places=places)
    shared = _TABLE_AT + _TABLE_BYTES * places // 2
    return load_kernel(compile_source(source, options_of(device)), "product", _PARAMETERS["product"], 32 * product_warps(tokens), shared)


def layer_source(bits: int, dtype: torch.dtype, kind: LayerKind, segmented: bool) -> str:
    """layer.cu in one of its kinds, with places that the device has shared memory for."""
    macros = {"WARPS": kind.warps, "BLOCKS": kind.blocks, "TABLE_AT": kind.table_at, "STORED": kind.stored}
    macros |= {"SEGMENTED": int(segmented), "ALL": int(kind.decodes_all)}
    files = "values.cu", "columns.cu", "chunks.cu", "operands.cu", "layer.cu"
    return trellis_source(*files, bits=bits, places=kind.places, dtype=DTYPES[dtype], **macros)


@cache
def layer_kernel(device: int, bits: int, dtype: torch.dtype, kind: LayerKind, segmented: bool) -> Kernel:
    """The kernel of layer.cu in one of its kinds, for activations of a dtype, with scales of segments or of tokens."""
    kind = kind._replace(places=min(kind.places, _places(device)))
    image = compile_source(layer_source(bits, dtype, kind, segmented), options_of(device))
    return load_kernel(image, "layer", (LayerArguments,), 32 * kind.warps, kind.shared)


def token_source(bits: int, dtype: torch.dtype, head: int, queries: int, places: int = 4) -> str:
    """Everything that takes a token through the layers of a decoder.

    Args:
        bits: bits per pair.
        dtype: of norms, biases and cache.
        head: numbers of an attention head.
        queries: query heads of a key-value head.
        places: as in decode.cu.
    """
    files = "values.cu", "steps.cu", "sums.cu", "attention.cu", "token.cu"
    macros = {"places": places, "dtype": DTYPES[dtype], "HEAD": head, "QUERIES": queries, "WARPS": TOKEN_WARPS, "STORED": _TOKEN_STORED}
    return trellis_source(*files, bits=bits, **macros)


@cache
def _token_image(device: int, bits: int, dtype: torch.dtype, head: int, queries: int) -> bytes:
    return compile_source(token_source(bits, dtype, head, queries, _places(device)), options_of(device))


@cache
def token_kernel(device: int, name: str, types: tuple[type, ...], variant: tuple[int, torch.dtype, int, int]) -> Kernel:
    """A kernel of token.cu; `variant` is what `token_source` needs but for the places."""
    whole = name == "decode_token"
    shared = _TABLE_AT + _TABLE_BYTES * _places(device) // 2 + _UNIT_BYTES * _TOKEN_STORED if whole else 0
    order = "cooperative" if whole else "plain"
    return load_kernel(_token_image(device, *variant), name, types, 32 * TOKEN_WARPS, shared, order)


@cache
def levels_kernel(device: int, bits: int, for_dense: bool) -> Kernel:
    """The kernel of levels.cu, for dense.cu or as a plain matrix."""
    places = _places(device)
    source = trellis_source("levels.cu", bits=bits, places=places, FOR_DENSE=int(for_dense))
    shared = _TABLE_AT + _TABLE_BYTES * places // 2
    return load_kernel(compile_source(source, options_of(device)), "levels", _PARAMETERS["levels"], 32 * WARPS, shared)


@cache
def activation_kernel(device: int, name: str, each: int, dtype: torch.dtype) -> Kernel:
    """A kernel of activations.cu, with so many values for each thread, for activations of a dtype."""
    source = source_of("values.cu", "launch.cu", "activations.cu", E=each, DTYPE=DTYPES[dtype])
    return load_kernel(compile_source(source, options_of(device)), name, _PARAMETERS[name], THREADS)


def workers_of(device: int, units: int, warps: int = WARPS) -> int:
    """Warps that share the units of a layer: all that fit on the device, `warps` a multiprocessor, if there is a unit for each."""
    return min(processors_of(device) * warps, units)
