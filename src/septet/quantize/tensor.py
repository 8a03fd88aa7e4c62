"""Quantized weights: the arrays to store, what describes them, and the weights they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from septet.codes import split as split_code
from septet.errors import ShapeError
from septet.kernels import select_backend
from septet.quantize import rotation

__all__ = ["QuantizedTensor", "RowSource", "common_inputs", "dequantize"]


class RowSource(Protocol):
    """A float32 matrix that hands out rows on demand: a NumPy array is one, and so is a tensor still on disk."""

    shape: tuple[int, int]
    dtype: np.dtype

    def __getitem__(self, rows: slice) -> np.ndarray: ...


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One weight matrix as it is stored.

    Args:
        code: "trellis", "split" or "int8".
        bits_per_pair: 6, 7 or 8; 16 for int8.
        shape: (out_features, in_features), without padding.
        packed: uint8 [ceil(N/64), ceil(K/4)*16*bits], or int8 [N, K].
        scale: float16 [N]; for split [N or 1, 2*G].
        offset: float16 like `scale`, for asymmetric split only.
        input_scale: float16 [K], s_in; None for split.
        input_block: Hadamard block along the inputs.
        output_block: Hadamard block along the outputs.
        group_size: inputs per group of split, None for one group.
        relative_error: |weight - dequantized| / |weight|, Frobenius.
    """

    code: str
    bits_per_pair: int
    shape: tuple[int, int]
    packed: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    input_scale: np.ndarray | None = None
    input_block: int = 1
    output_block: int = 1
    group_size: int | None = None
    relative_error: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Stored bytes, padding, scales and offsets included."""
        return sum(array.nbytes for array in self.tensors().values())

    @property
    def effective_bits(self) -> float:
        """Stored bits per true weight, all metadata counted."""
        return 8 * self.size_bytes / (self.shape[0] * self.shape[1])

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays to store, by the last part of their key."""
        named = {
            "weight": self.packed,
            "weight_scale": self.scale,
            "weight_offset": self.offset,
            "weight_input_scale": self.input_scale,
        }
        return {name: array for name, array in named.items() if array is not None}

    def config(self) -> dict[str, object]:
        """What a reader needs besides the arrays, as JSON values."""
        described: dict[str, object] = {
            "code": self.code,
            "bits_per_pair": self.bits_per_pair,
            "in_features": self.shape[1],
            "out_features": self.shape[0],
        }
        if self.code == "split":
            described |= {"symmetric": self.offset is None, "scale_rows": self.scale.shape[0], "group_size": self.group_size}
        else:
            described |= {"input_block": self.input_block, "output_block": self.output_block}
        return described | {"relative_error": self.relative_error}


def dequantize(quantized: QuantizedTensor) -> np.ndarray:
    """The weights that a QuantizedTensor stands for: float32 [N, K]."""
    outputs, inputs = quantized.shape
    if quantized.code == "split":
        return _dequantize_split(quantized)
    if quantized.code == "int8":
        levels = quantized.packed
    else:
        levels = select_backend().trellis_levels(quantized.packed, quantized.bits_per_pair)[:outputs, :inputs]
    scale, input_scale = quantized.scale.astype(np.float32), quantized.input_scale.astype(np.float32)
    return rotation.unrotate(levels, scale, input_scale, quantized.input_block, quantized.output_block)


def common_inputs(weights: Sequence[RowSource]) -> int:
    """The number of inputs of all weights, after checking them."""
    for weight in weights:
        if weight.dtype != np.float32 or len(weight.shape) != 2 or 0 in weight.shape:
            raise ShapeError("weights must be float32 [out_features, in_features]", f"{weight.dtype} {list(weight.shape)}", "convert them")
    inputs = {weight.shape[1] for weight in weights}
    if len(inputs) != 1:
        raise ShapeError("tensors of a fused group must have the same in_features", sorted(inputs), "quantize them one by one")
    return inputs.pop()


def _dequantize_split(quantized: QuantizedTensor) -> np.ndarray:
    outputs, inputs = quantized.shape
    fields = select_backend().split_fields(quantized.packed)[:outputs, :inputs]
    columns = np.arange(inputs)
    group = columns // (quantized.group_size or inputs)
    slot = 2 * group + columns % 2
    weight = np.empty(quantized.shape, np.float32)
    zero = split_code.zero_points(inputs).astype(np.float32)
    for start, stop in rotation.row_pieces(quantized.shape):
        rows = slice(start, stop) if len(quantized.scale) > 1 else slice(None)
        scale = quantized.scale[rows].astype(np.float32)[:, slot]
        codes = fields[start:stop].astype(np.float32)
        if quantized.offset is None:
            weight[start:stop] = scale * (codes - zero)
        else:
            weight[start:stop] = scale * codes + quantized.offset[rows].astype(np.float32)[:, slot]
    return weight
