"""The Fortran backend: native/fortran/ behind the interface of `kernels.reference`, and equal to it bit for bit.

A second implementation, written from SPEC.md alone. It is chosen by SEPTET_BACKEND=fortran only, works in the caller's thread
(`threads` changes nothing), and exists once per Fortran compiler: SEPTET_FORTRAN=flang or gfortran picks one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from septet.codes.tile import PAIRS_PER_TILE, TILE_INPUTS, TILE_OUTPUTS, tile_bytes
from septet.errors import OptionError, ShapeError
from septet.kernels import fortran_library as c
from septet.kernels.weights import LayerWeights

__all__ = [
    "NAME",
    "PreparedLayer",
    "compiler",
    "compilers",
    "dequantize",
    "hadamard",
    "int8_product",
    "int8_product_float",
    "linear_int8",
    "linear_split",
    "linear_trellis",
    "pack",
    "prepare",
    "quantize_activations",
    "set_compiler",
    "split_fields",
    "split_product",
    "split_product_float",
    "trellis_accumulate",
    "trellis_encode",
    "trellis_levels",
    "trellis_product",
    "trellis_product_float",
    "unpack",
]

NAME = "fortran"
_CODES = {"split": 0, "trellis": 1, "int8": 2}
_ACTIVATIONS = {"int8": 0, "float": 1}
_NO_THREADS = ctypes.c_int(0)

_library = dict(zip(("name", "handle"), c.open_library()))

#: {compiler: "" or why its library is not there}, in order of preference.
compilers = c.compilers


def compiler() -> str:
    """The compiler whose library is in use."""
    return _library["name"]


def set_compiler(name: str | None) -> None:
    """Use another compiler's library from now on; None returns to the automatic choice. For tests and measurements.

    Raises:
        BackendUnavailableError: there is no such library.
    """
    _library["name"], _library["handle"] = c.open_library(name)


def _call(name: str, *arguments: object) -> None:
    c.call(_library["handle"], name, *arguments)


def pack(symbols: np.ndarray, bits: int) -> np.ndarray:
    """Symbols to bytes: uint8 [R, T, 128] -> uint8 [R, T*16*bits]."""
    size = tile_bytes(bits)
    c.checked(symbols, "symbols", np.uint8, (None, None, PAIRS_PER_TILE))
    packed = np.empty((symbols.shape[0], symbols.shape[1] * size), np.uint8)
    _call("pack", symbols, symbols.shape[0] * symbols.shape[1], ctypes.c_int(bits), packed)
    return packed


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes to symbols: uint8 [R, T*16*bits] -> uint8 [R, T, 128]."""
    tiles = c.tiles_of(packed, bits)
    symbols = np.empty((tiles.rows, tiles.columns, PAIRS_PER_TILE), np.uint8)
    _call("unpack", packed, tiles.rows * tiles.columns, ctypes.c_int(bits), symbols)
    return symbols


def trellis_levels(packed: np.ndarray, bits: int) -> np.ndarray:
    """Levels of packed trellis weights: uint8 [R, T*16*bits] -> int8 [R*64, T*4], padding included."""
    return _decode("trellis_levels", c.tiles_of(packed, bits), np.int8)


def split_fields(packed: np.ndarray) -> np.ndarray:
    """Fields of packed split weights: uint8 [R, T*112] -> uint8 [R*64, T*4], q4 in even and q3 in odd columns."""
    return _decode("split_fields", c.tiles_of(packed, 7), np.uint8)


def _decode(name: str, tiles: c.Tiles, dtype: type) -> np.ndarray:
    values = np.empty((tiles.rows * TILE_OUTPUTS, tiles.columns * TILE_INPUTS), dtype)
    _call(name, tiles, values, _NO_THREADS)
    return values


def trellis_encode(fixed: np.ndarray, bits: int, threads: int = 0) -> np.ndarray:
    """Encode tiles, int16 [tiles, 256] in quarter levels -> uint8 [tiles, 128]."""
    tile_bytes(bits)
    c.checked(fixed, "encoder input", np.int16, (None, 2 * PAIRS_PER_TILE))
    symbols = np.empty((len(fixed), PAIRS_PER_TILE), np.uint8)
    _call("trellis_encode", fixed, len(fixed), ctypes.c_int(bits), symbols, ctypes.c_int(threads))
    return symbols


def hadamard(x: np.ndarray, block: int) -> np.ndarray:
    """Rotate blocks of inputs: float32 [M, K] -> float32 [M, K]."""
    c.checked(x, "values", np.float32, (None, None))
    if block < 1 or block & (block - 1) or x.shape[1] % block:
        raise ShapeError(f"a Hadamard block must be a power of two that divides {x.shape[1]}", block, "choose a smaller block")
    y = np.empty_like(x)
    _call("hadamard", x, *x.shape, block, y)
    return y


def quantize_activations(x: np.ndarray, segment: int) -> tuple[np.ndarray, np.ndarray]:
    """Round activations, float32 [M, K], to int8 [M, K] with scales float32 [M, ceil(K/segment)]."""
    c.checked(x, "activations", np.float32, (None, None))
    if segment < 1:
        raise ShapeError("a segment must be at least 1", segment, "use the number of inputs for one scale per token")
    values, scales = np.empty(x.shape, np.int8), np.empty((len(x), -(-x.shape[1] // segment)), np.float32)
    _call("quantize_activations", x, *x.shape, segment, values, scales)
    return values, scales


def _activations(xq: np.ndarray, xscale: np.ndarray, features: int, segment: int) -> c.Activations:
    """int8 [M, features] and float32 [M, ceil(features/segment)] as the library sees them."""
    c.checked(xq, "activations", np.int8, (None, features))
    if segment < 1:
        raise ShapeError("a segment must be at least 1", segment, "use the number of inputs for one scale per token")
    c.checked(xscale, "activation scales", np.float32, (len(xq), -(-features // segment)))
    return c.Activations(xq.ctypes.data, xscale.ctypes.data, len(xq), segment)


def trellis_accumulate(packed: np.ndarray, bits: int, xq: np.ndarray) -> np.ndarray:
    """Exact integer product of int8 [M, T*4] with the levels: int32 [M, R*64]."""
    tiles = c.tiles_of(packed, bits)
    c.checked(xq, "activations", np.int8, (None, tiles.columns * TILE_INPUTS))
    sums = np.empty((len(xq), tiles.rows * TILE_OUTPUTS), np.int32)
    _call("trellis_accumulate", tiles, xq, len(xq), sums, _NO_THREADS)
    return sums


def trellis_product(packed: np.ndarray, bits: int, xq: np.ndarray, xscale: np.ndarray, segment: int) -> np.ndarray:
    """Scaled product of int8 [M, T*4] and float32 [M, ceil(T*4/segment)] with the levels: float32 [M, R*64]."""
    tiles = c.tiles_of(packed, bits)
    activations = _activations(xq, xscale, tiles.columns * TILE_INPUTS, segment)
    y = np.empty((len(xq), tiles.rows * TILE_OUTPUTS), np.float32)
    _call("trellis_product", tiles, activations, y, _NO_THREADS)
    return y


def trellis_product_float(packed: np.ndarray, bits: int, x: np.ndarray) -> np.ndarray:
    """Product of float32 [M, T*4] with the levels: float32 [M, R*64]."""
    tiles = c.tiles_of(packed, bits)
    c.checked(x, "activations", np.float32, (None, tiles.columns * TILE_INPUTS))
    y = np.empty((len(x), tiles.rows * TILE_OUTPUTS), np.float32)
    _call("trellis_product_float", tiles, x, len(x), y, _NO_THREADS)
    return y


def _transposed(scales: np.ndarray | None, out_features: int, groups: int) -> np.ndarray | None:
    """Scales or offsets of the split code, [N or 1, 2*G], as septet.h wants them: float32 [2*G, N padded to 64]; ShapeError else."""
    if scales is None:
        return None
    if scales.ndim != 2 or scales.shape[0] not in (1, out_features) or scales.shape[1] != 2 * groups:
        raise ShapeError(f"scales must be [{out_features} or 1, {2 * groups}]", list(scales.shape), "check group_size")
    result = np.zeros((scales.shape[1], -(-out_features // TILE_OUTPUTS) * TILE_OUTPUTS), np.float32)
    result[:, :out_features] = scales.T
    return result


def _address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def split_product(
    packed: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray | None,
    xq: np.ndarray,
    xscale: np.ndarray,
    group: int,
    out_features: int,
) -> np.ndarray:
    """Product of int8 [M, T*4], float32 scales [M, G], with split weights: float32 [M, out_features]; see `kernels.reference`."""
    tiles = c.tiles_of(packed, 7)
    activations = _activations(xq, xscale, tiles.columns * TILE_INPUTS, group)
    steps, offsets = (_transposed(array, out_features, xscale.shape[1]) for array in (scale, offset))
    y = np.empty((len(xq), out_features), np.float32)
    scales = c.SplitScales(_address(steps), _address(offsets), group)
    _call("split_product", tiles, scales, activations, out_features, y, _NO_THREADS)
    return y


def split_product_float(
    packed: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, x: np.ndarray, group: int, out_features: int
) -> np.ndarray:
    """Product of float32 [M, T*4] with split weights: float32 [M, out_features]."""
    tiles = c.tiles_of(packed, 7)
    c.checked(x, "activations", np.float32, (None, tiles.columns * TILE_INPUTS))
    if group < 1:
        raise ShapeError("a group must be at least 1", group, "use the number of inputs for one group")
    groups = -(-x.shape[1] // group)
    steps, offsets = (_transposed(array, out_features, groups) for array in (scale, offset))
    y = np.empty((len(x), out_features), np.float32)
    scales = c.SplitScales(_address(steps), _address(offsets), group)
    _call("split_product_float", tiles, scales, x, len(x), out_features, y, _NO_THREADS)
    return y


def int8_product(weight: np.ndarray, scale: np.ndarray, xq: np.ndarray, xscale: np.ndarray) -> np.ndarray:
    """Product of int8 [M, K], float32 scales [M, 1], with int8 [N, K], float32 scales [N]: float32 [M, N]."""
    rows = c.rows_of(weight, scale)
    y = np.empty((len(xq), len(weight)), np.float32)
    _call("int8_product", rows, _activations(xq, xscale, weight.shape[1], weight.shape[1]), y, _NO_THREADS)
    return y


def int8_product_float(weight: np.ndarray, scale: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Product of float32 [M, K] with int8 [N, K], float32 scales [N]: float32 [M, N]."""
    rows = c.rows_of(weight, scale)
    c.checked(x, "activations", np.float32, (None, weight.shape[1]))
    y = np.empty((len(x), len(weight)), np.float32)
    _call("int8_product_float", rows, x, len(x), y, _NO_THREADS)
    return y


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """A layer as the library reads it; `arrays` are what the structure points to."""

    layer: LayerWeights
    structure: c.Layer
    arrays: tuple[np.ndarray | None, ...]


def prepare(layer: LayerWeights) -> PreparedLayer:
    """Convert the scales of a layer once, for the linear_* functions; the weights are not copied.

    Args:
        layer: any code. Its `packed` array must stay unchanged.

    Returns:
        What the linear_* functions of this backend take as `layer`.
    """
    scales = [layer.scale, layer.offset, layer.input_scale]
    if layer.code == "split":
        scales = [*(_transposed(array, layer.out_features, layer.groups) for array in scales[:2]), None]
    arrays = (layer.packed, *(None if array is None else array.astype(np.float32) for array in scales))
    sizes = layer.in_features, layer.out_features
    blocks = layer.input_block, layer.output_block, layer.group_size or 0, layer.segment
    structure = c.Layer(_CODES[layer.code], layer.bits_per_pair, *sizes, *map(_address, arrays), *blocks)
    return PreparedLayer(layer, structure, arrays)


def dequantize(layer: PreparedLayer) -> np.ndarray:
    """The weights of a layer: float32 [N, K]."""
    weights = np.empty((layer.layer.out_features, layer.layer.in_features), np.float32)
    _call("dequantize", layer.structure, weights)
    return weights


def linear_trellis(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole trellis layer without its bias; Args, Returns and Raises as in `kernels.reference`."""
    return _linear(x, layer, activations, threads, "trellis")


def linear_split(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole split layer without its bias; Args, Returns and Raises as in `kernels.reference`."""
    return _linear(x, layer, activations, threads, "split")


def linear_int8(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole int8 head without its bias; Args, Returns and Raises as in `kernels.reference`."""
    return _linear(x, layer, activations, threads, "int8")


def _linear(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int, code: str) -> np.ndarray:
    if layer.layer.code != code:
        raise OptionError(f"linear_{code} must get a {code} layer", layer.layer.code, f"call linear_{layer.layer.code}")
    if activations not in _ACTIVATIONS:
        raise OptionError("activations must be int8 or float", activations, "choose one of the two")
    c.checked(x, "inputs", np.float32, (None, layer.layer.in_features))
    y = np.empty((len(x), layer.layer.out_features), np.float32)
    _call("linear", layer.structure, x, len(x), ctypes.c_int(_ACTIVATIONS[activations]), y, ctypes.c_int(threads))
    return y
