"""The reference backend: every kernel in NumPy, written to be read. All other backends are tested equal to it.

Integers are exact; float32 steps happen in a stated order with one rounding each, so equal means bit for bit. Only products
with float activations leave the order of additions open. `prepare` decodes a layer once; the linear_* functions run it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet import packing
from septet.codes import split, trellis
from septet.codes.tile import matrix_of_tiles
from septet.errors import OptionError, ShapeError
from septet.kernels import reference_products as products
from septet.kernels.reference_activations import hadamard, quantize_activations
from septet.kernels.weights import LayerWeights

__all__ = [
    "NAME",
    "PreparedLayer",
    "hadamard",
    "int8_product",
    "int8_product_float",
    "linear_int8",
    "linear_split",
    "linear_trellis",
    "pack",
    "prepare",
    "quantize_activations",
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

NAME = "reference"
ACTIVATIONS = ("int8", "float")

pack = packing.pack
unpack = packing.unpack


def trellis_levels(packed: np.ndarray, bits: int) -> np.ndarray:
    """Levels of packed trellis weights: uint8 [R, T*16*bits] -> int8 [R*64, T*4], padding included."""
    return matrix_of_tiles(trellis.decode(packing.unpack(packed, bits), bits))


def trellis_encode(fixed: np.ndarray, bits: int, threads: int = 0) -> np.ndarray:
    """Encode tiles, int16 [tiles, 256] in quarter levels -> uint8 [tiles, 128]; one thread, whatever `threads` says."""
    return trellis.encode(fixed, bits)


def split_fields(packed: np.ndarray) -> np.ndarray:
    """Fields of packed split weights: uint8 [R, T*112] -> uint8 [R*64, T*4], q4 in even and q3 in odd columns."""
    return matrix_of_tiles(split.fields_of_symbols(packing.unpack(packed, split.BITS_PER_PAIR)))


def trellis_accumulate(packed: np.ndarray, bits: int, xq: np.ndarray) -> np.ndarray:
    """Exact integer product of int8 [M, T*4] with the levels: int32 [M, R*64]."""
    return products.integer_product(xq, trellis_levels(packed, bits))


def trellis_product(packed: np.ndarray, bits: int, xq: np.ndarray, xscale: np.ndarray, segment: int) -> np.ndarray:
    """Scaled product of int8 [M, T*4] and float32 [M, ceil(T*4/segment)] with the levels: float32 [M, R*64]."""
    return products.segmented_product(trellis_levels(packed, bits), xq, xscale, segment)


def trellis_product_float(packed: np.ndarray, bits: int, x: np.ndarray) -> np.ndarray:
    """Product of float32 [M, T*4] with the levels: float32 [M, R*64]."""
    return products.float_product(x, trellis_levels(packed, bits))


def split_product(
    packed: np.ndarray,
    scale: np.ndarray,
    offset: np.ndarray | None,
    xq: np.ndarray,
    xscale: np.ndarray,
    group: int,
    out_features: int,
) -> np.ndarray:
    """Product of int8 [M, T*4], float32 scales [M, G], with split weights: float32 [M, out_features]; see `split_scaled`."""
    return products.split_scaled(split_fields(packed)[:out_features], scale, offset, xq, xscale, group)


def split_product_float(
    packed: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, x: np.ndarray, group: int, out_features: int
) -> np.ndarray:
    """Product of float32 [M, T*4] with split weights: float32 [M, out_features]."""
    return products.split_scaled(split_fields(packed)[:out_features], scale, offset, x, None, group)


def int8_product(weight: np.ndarray, scale: np.ndarray, xq: np.ndarray, xscale: np.ndarray) -> np.ndarray:
    """Product of int8 [M, K], float32 scales [M, 1], with int8 [N, K], float32 scales [N]: float32 [M, N]."""
    return products.int8_scaled(weight, scale, xq, xscale)


def int8_product_float(weight: np.ndarray, scale: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Product of float32 [M, K] with int8 [N, K], float32 scales [N]: float32 [M, N]."""
    return scale * products.float_product(x, weight)


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """A decoded layer: weights int8 (split: uint8) [padded N, padded K], and its scales in float32."""

    layer: LayerWeights
    weights: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None
    input_scale: np.ndarray | None


def prepare(layer: LayerWeights) -> PreparedLayer:
    """Decode a layer once, for the linear_* functions.

    Args:
        layer: any code.

    Returns:
        What the linear_* functions of this backend take as `layer`.
    """
    if layer.code == "trellis":
        weights = trellis_levels(layer.packed, layer.bits_per_pair)
    elif layer.code == "split":
        weights = split_fields(layer.packed)[: layer.out_features]
    else:
        weights = layer.packed
    optional = [None if array is None else array.astype(np.float32) for array in (layer.offset, layer.input_scale)]
    return PreparedLayer(layer, weights, layer.scale.astype(np.float32), *optional)


def linear_trellis(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole trellis layer without its bias: y = s_out * H_out(levels @ H_in(s_in * x)).

    Args:
        x: float32 [M, K].
        layer: from `prepare`.
        activations: "int8" rounds the rotated inputs, "float" does not.
        threads: ignored by this backend.

    Returns:
        float32 [M, N]; a token with a NaN or infinity gives NaN.

    Raises:
        OptionError: unknown `activations`, or a layer of another code.
        ShapeError: `x` is not float32 [M, K].
    """
    _check_call(x, layer, activations, "trellis")
    stored = layer.layer
    with np.errstate(invalid="ignore", over="ignore"):
        rotated = _pad(hadamard(x * layer.input_scale, stored.input_block), stored.padded_in_features)
        if activations == "float":
            y = products.float_product(rotated, layer.weights)
        else:
            y = products.segmented_product(layer.weights, *quantize_activations(rotated, stored.segment), stored.segment)
        return hadamard(y[:, : stored.out_features], stored.output_block) * layer.scale


def linear_split(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole split layer without its bias. Args, Returns and Raises as `linear_trellis`."""
    _check_call(x, layer, activations, "split")
    stored = layer.layer
    group = stored.padded_in_features if stored.group_size is None else stored.group_size
    with np.errstate(invalid="ignore", over="ignore"):
        xq, xscale = _pad(x, stored.padded_in_features), None
        if activations == "int8":
            xq, xscale = quantize_activations(xq, group)
        return products.split_scaled(layer.weights, layer.scale, layer.offset, xq, xscale, group)


def linear_int8(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole int8 head without its bias: y = scale * (weights @ H_in(s_in * x)). Args, Returns and Raises as `linear_trellis`."""
    _check_call(x, layer, activations, "int8")
    stored = layer.layer
    with np.errstate(invalid="ignore", over="ignore"):
        rotated = hadamard(x * layer.input_scale, stored.input_block)
        if activations == "float":
            return int8_product_float(layer.weights, layer.scale, rotated)
        return int8_product(layer.weights, layer.scale, *quantize_activations(rotated, stored.segment))


def _pad(x: np.ndarray, features: int) -> np.ndarray:
    """Zeros up to whole tiles: float32 [M, features]."""
    return np.pad(x, ((0, 0), (0, features - x.shape[1])))


def _check_call(x: np.ndarray, layer: PreparedLayer, activations: str, code: str) -> None:
    if layer.layer.code != code:
        raise OptionError(f"linear_{code} must get a {code} layer", layer.layer.code, f"call linear_{layer.layer.code}")
    if activations not in ACTIVATIONS:
        raise OptionError("activations must be int8 or float", activations, "choose one of the two")
    wanted = layer.layer.in_features
    if x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != wanted:
        got = f"{x.dtype} {list(x.shape)}"
        raise ShapeError(f"inputs must be float32 [tokens, {wanted}]", got, "flatten the batch and convert to float32")
