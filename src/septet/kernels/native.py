"""The native backend: the kernels of include/septet.h, with the interface of `kernels.reference` and equal to it bit for bit.

Importing this module decides the instruction set: an impossible SEPTET_CPU is an error at once. `threads` everywhere: how many
threads may work; 0 means SEPTET_THREADS, else OMP_NUM_THREADS, else all processors. Results do not depend on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet import _native
from septet.codes.tile import TILE_OUTPUTS
from septet.errors import OptionError
from septet.kernels.weights import LayerWeights

__all__ = [
    "NAME",
    "PreparedLayer",
    "hadamard",
    "instruction_set",
    "instruction_sets",
    "int8_product",
    "int8_product_float",
    "linear_int8",
    "linear_split",
    "linear_trellis",
    "pack",
    "prepare",
    "quantize_activations",
    "read_sum",
    "set_instruction_set",
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

NAME = "native"
_CODES = {"split": 0, "trellis": 1, "int8": 2}
_ACTIVATIONS = {"int8": False, "float": True}
_LINE = 64

#: {name: "" or why it cannot run here}, from the slowest to the fastest.
instruction_sets = _native.instruction_sets
#: The name of the set in use.
instruction_set = _native.instruction_set
#: Use another set from now on; None returns to the automatic choice. For tests and measurements.
set_instruction_set = _native.set_instruction_set

pack = _native.pack
unpack = _native.unpack
trellis_levels = _native.trellis_levels
trellis_encode = _native.trellis_encode
split_fields = _native.split_fields
hadamard = _native.hadamard
quantize_activations = _native.quantize_activations
#: Sum of uint8 [n] as 64-bit numbers: how fast this memory can be read.
read_sum = _native.read_sum
trellis_accumulate = _native.trellis_accumulate
trellis_product = _native.trellis_product
trellis_product_float = _native.trellis_product_float
int8_product = _native.int8_product
int8_product_float = _native.int8_product_float

instruction_set()
_native.default_threads()


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
    transposed = (None if scales is None else _transposed(scales, out_features) for scales in (scale, offset))
    return _native.split_product(packed, *transposed, xq, xscale, group, out_features)


def split_product_float(
    packed: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, x: np.ndarray, group: int, out_features: int
) -> np.ndarray:
    """Product of float32 [M, T*4] with split weights: float32 [M, out_features]."""
    transposed = (None if scales is None else _transposed(scales, out_features) for scales in (scale, offset))
    return _native.split_product_float(packed, *transposed, x, group, out_features)


def _transposed(scales: np.ndarray, out_features: int) -> np.ndarray:
    """Scales or offsets of the split code, [N or 1, 2*G], as the kernels read them: float32 [2*G, N padded to 64]."""
    result = np.zeros((scales.shape[1], -(-out_features // TILE_OUTPUTS) * TILE_OUTPUTS), np.float32)
    result[:, :out_features] = scales.T
    return result


@dataclass(frozen=True, eq=False)
class PreparedLayer:
    """A layer as the kernels read it: the packed weights where they are or in a copy, the scales in float32."""

    code: str
    kernel: _native.Layer


def prepare(layer: LayerWeights, arrange: bool = False) -> PreparedLayer:
    """Convert the scales of a layer once, for the linear_* functions; the weights are not copied unless they are arranged.

    Args:
        layer: any code. Its `packed` array must stay unchanged if the weights are not arranged, and may go if they are.
        arrange: copy the weights in the order that the instruction set in use now reads fastest, as engines do; later choices of
            a set do not matter to this layer then.

    Returns:
        What the linear_* functions of this backend take as `layer`.
    """
    split = layer.code == "split"
    scale, offset, input_scale = layer.scale.astype(np.float32), layer.offset, layer.input_scale
    if split:
        scale = _transposed(scale, layer.out_features)
        offset = None if offset is None else _transposed(offset, layer.out_features)
    sizes = (
        _CODES[layer.code],
        layer.bits_per_pair,
        layer.in_features,
        layer.out_features,
        layer.input_block,
        layer.output_block,
        layer.group_size or 0,
        layer.segment,
    )
    input_scale = None if input_scale is None else input_scale.astype(np.float32)
    kernel = _native.Layer(layer.packed, scale, offset, input_scale, sizes)
    return PreparedLayer(layer.code, kernel.arranged(_aligned(layer.packed.nbytes)) if arrange else kernel)


def _aligned(size: int) -> np.ndarray:
    """Memory that begins with a line of the cache: uint8 [size]."""
    memory = np.empty(size + _LINE - 1, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + size]


def linear_trellis(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole trellis layer without its bias: y = s_out * H_out(levels @ H_in(s_in * x)).

    Args:
        x: float32 [M, K].
        layer: from `prepare`.
        activations: "int8" rounds the rotated inputs, "float" does not.
        threads: how many threads may work.

    Returns:
        float32 [M, N]; a token with a NaN or infinity gives NaN.

    Raises:
        OptionError: unknown `activations`, or a layer of another code.
        ShapeError: `x` is not contiguous float32 [M, K].
    """
    return _linear(x, layer, activations, threads, "trellis")


def linear_split(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole split layer without its bias. Args, Returns and Raises as `linear_trellis`."""
    return _linear(x, layer, activations, threads, "split")


def linear_int8(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int = 0) -> np.ndarray:
    """A whole int8 head without its bias: y = scale * (weights @ H_in(s_in * x)). Args, Returns and Raises as `linear_trellis`."""
    return _linear(x, layer, activations, threads, "int8")


def _linear(x: np.ndarray, layer: PreparedLayer, activations: str, threads: int, code: str) -> np.ndarray:
    if layer.code != code:
        raise OptionError(f"linear_{code} must get a {code} layer", layer.code, f"call linear_{layer.code}")
    if activations not in _ACTIVATIONS:
        raise OptionError("activations must be int8 or float", activations, "choose one of the two")
    return layer.kernel.linear(x, _ACTIVATIONS[activations], threads)
