"""Quantized weights: the arrays to store, what describes them, and how they are made and turned back.

`quantize_trellis` takes the tensors of one fused group (q/k/v, gate/up) together, because they share s_in and the input block.
`quantize_split` is the memoryless code. Padding to whole tiles encodes as weight 0 (trellis) or symbol 0 (split).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from septet.codes import split as split_code
from septet.codes import trellis as trellis_code
from septet.codes.tile import check_bits, tile_grid, tiles_of_matrix
from septet.errors import OptionError, ShapeError
from septet.kernels import select_backend
from septet.quantize import ranges, rotation, scales
from septet.quantize.units import GRANULARITIES, quantize_units

__all__ = ["QuantizedTensor", "dequantize", "quantize_split", "quantize_trellis"]


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


def quantize_trellis(
    weights: list[np.ndarray],
    names: list[str],
    bits_per_pair: int = 7,
    rotation_block: int = 256,
    seed: int = 0,
    threads: int = 0,
) -> list[QuantizedTensor]:
    """Quantize the tensors of one fused group.

    Args:
        weights: float32 [N_i, K], finite.
        names: a module name for each; they and the seed choose the random signs. The first one names the group.
        bits_per_pair: 6, 7 or 8.
        rotation_block: the largest Hadamard block, a power of two.
        seed: of the random signs.
        threads: 0 is the default number; the result does not depend on it.

    Returns:
        One QuantizedTensor per weight, with the same input_scale and input_block.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown width or block.
        ShapeError: the weights do not have the same number of inputs.
    """
    check_bits(bits_per_pair)
    inputs = _common_inputs(weights)
    input_block = rotation.choose_block([inputs], rotation_block)
    output_block = rotation.choose_block([len(weight) for weight in weights], rotation_block)
    input_scale, magnitudes, exponent = _group_scales(weights, names, output_block, bits_per_pair)
    input_scale *= rotation.random_signs(seed, f"{names[0]}/in", inputs)
    results = []
    for weight, name, magnitude in zip(weights, names, magnitudes):
        signs = rotation.random_signs(seed, f"{name}/out", len(weight))
        wanted = signs * magnitude / 2.0**exponent
        rotated, scale = _rotate_with_rounded_scale(weight, name, wanted, input_scale, (input_block, output_block), bits_per_pair)
        packed = _encode_trellis(rotated, bits_per_pair, threads)
        del rotated
        stored = QuantizedTensor(
            code="trellis",
            bits_per_pair=bits_per_pair,
            shape=weight.shape,
            packed=packed,
            scale=scale,
            input_scale=input_scale.astype(np.float16),
            input_block=input_block,
            output_block=output_block,
        )
        results.append(_with_error(stored, weight))
    return results


def quantize_split(
    weight: np.ndarray,
    symmetric: bool = False,
    granularity: str = "channel",
    group_size: int = 128,
    range_method: str = "mse",
    threads: int = 0,
    name: str = "weight",
) -> QuantizedTensor:
    """Quantize with the memoryless code.

    Args:
        weight: float32 [N, K], finite.
        symmetric: store no offsets.
        granularity: "channel" (a row), "group" (`group_size` inputs of a row) or "tensor": what shares a scale.
        group_size: a multiple of 4, used with granularity "group".
        range_method: "mse", "minmax" or "minmax_shared"; see `ranges`.
        threads: 0 is the default number; the result does not depend on it.
        name: module name, for messages.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        OptionError: an unknown granularity, method or group size.
        ShapeError: the weight is not float32 [N, K].
    """
    _common_inputs([weight])
    if granularity not in GRANULARITIES:
        raise OptionError(f"granularity must be one of {', '.join(GRANULARITIES)}", granularity, "use channel")
    if range_method not in ranges.METHODS:
        raise OptionError(f"the range method must be one of {', '.join(ranges.METHODS)}", range_method, "use mse")
    if granularity == "group" and (group_size < 4 or group_size % 4):
        raise OptionError("group_size must be a multiple of 4", group_size, "use 128")
    scales.check_finite(scales.row_norms(weight), name)
    group = {"channel": None, "group": group_size, "tensor": None}[granularity]
    fields, scale, offset = quantize_units(weight, name, symmetric, granularity, group, range_method, threads)
    tiles = tiles_of_matrix(fields)
    symbols = split_code.symbols_of_fields(tiles)
    packed = select_backend().pack(np.ascontiguousarray(symbols), split_code.BITS_PER_PAIR)
    stored = QuantizedTensor("split", split_code.BITS_PER_PAIR, weight.shape, packed, scale, offset, group_size=group)
    return _with_error(stored, weight)


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


def _common_inputs(weights: list[np.ndarray]) -> int:
    """The number of inputs of all weights, after checking them."""
    for weight in weights:
        if weight.dtype != np.float32 or weight.ndim != 2 or 0 in weight.shape:
            raise ShapeError("weights must be float32 [out_features, in_features]", f"{weight.dtype} {list(weight.shape)}", "convert them")
    inputs = {weight.shape[1] for weight in weights}
    if len(inputs) != 1:
        raise ShapeError("tensors of a fused group must have the same in_features", sorted(inputs), "quantize them one by one")
    return inputs.pop()


def _group_scales(weights: list[np.ndarray], names: list[str], output_block: int, bits: int) -> tuple[np.ndarray, list[np.ndarray], int]:
    """|s_in| as fp16 holds it, float32 [K]; |s_out| for unit variance, float64 [N_i] each; and the exponent moved from s_out to s_in.

    Weights so small or large that fp16 cannot hold s_out move a power of two to s_in; there is no room for column scales then.
    """
    for weight, name in zip(weights, names):
        scales.check_finite(scales.row_norms(weight), name)
    columns = scales.round_to_float16(scales.trellis_input_scale(weights), names[0]).astype(np.float32)
    magnitudes = [scales.trellis_output_scale(scales.row_norms(weight, columns), output_block) for weight in weights]
    per_sigma = trellis_code.WIDTHS[bits].levels_per_sigma
    exponent = scales.scale_exponent([magnitude / per_sigma for magnitude in magnitudes])
    if exponent:
        columns = np.full(weights[0].shape[1], 2.0**exponent, np.float32)
        magnitudes = [scales.trellis_output_scale(scales.row_norms(weight), output_block) for weight in weights]
    return columns, magnitudes, exponent


def _rotate_with_rounded_scale(
    weight: np.ndarray, name: str, wanted: np.ndarray, input_scale: np.ndarray, blocks: tuple[int, int], bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """The rotated weights in standard deviations, float32 [N, K], and the stored scale, float16 [N]."""
    per_sigma = trellis_code.WIDTHS[bits].levels_per_sigma
    scale = scales.round_to_float16(wanted / per_sigma, name)
    rotated = rotation.rotate(weight, scale.astype(np.float32) * np.float32(per_sigma), input_scale, *blocks)
    factors = scales.headroom(rotated, bits, blocks[1])
    if (factors != 1).any():
        scale = scales.round_to_float16(wanted * factors / per_sigma, name)
        rotated = rotation.rotate(weight, scale.astype(np.float32) * np.float32(per_sigma), input_scale, *blocks)
    return rotated, scale


def _encode_trellis(rotated: np.ndarray, bits: int, threads: int) -> np.ndarray:
    """float32 [N, K] in standard deviations -> packed uint8."""
    rows, columns = tile_grid(*rotated.shape)
    fixed = tiles_of_matrix(trellis_code.to_fixed(rotated, bits)).reshape(rows * columns, -1)
    backend = select_backend()
    symbols = backend.trellis_encode(fixed, bits, threads)
    return backend.pack(symbols.reshape(rows, columns, -1), bits)


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


def _with_error(quantized: QuantizedTensor, weight: np.ndarray) -> QuantizedTensor:
    return replace(quantized, relative_error=scales.relative_error(weight, dequantize(quantized)))
