"""The int8 code of the output head and of a tied embedding: one scale per row, and the inputs rotated.

stored row = rint(H_in(s_in * row) / scale), s_in = random signs. There is no output rotation, so an embedding look-up reads one row.
The scale is absmax / 127 rounded up to fp16, so that nothing is clipped.
"""

from __future__ import annotations

import numpy as np

from septet.errors import ShapeError
from septet.quantize import rotation, scales
from septet.quantize.tensor import QuantizedTensor, RowSource

__all__ = ["INT8_BITS_PER_PAIR", "quantize_int8"]

INT8_BITS_PER_PAIR = 16
_LARGEST = 127


def quantize_int8(weight: RowSource, name: str, rotation_block: int = 256, seed: int = 0) -> QuantizedTensor:
    """Quantize rows to int8.

    Args:
        weight: [N, K], finite; slices of rows must be float32 arrays.
        name: module name; it and the seed choose the random signs.
        rotation_block: the largest Hadamard block, a power of two.
        seed: of the random signs.

    Raises:
        CodeRangeError: a weight is not finite, or too large for fp16 scales.
        ShapeError: the weight is not a matrix.
    """
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ShapeError("weights must be [out_features, in_features]", list(weight.shape), "keep this tensor unquantized")
    outputs, inputs = weight.shape
    block = rotation.choose_block([inputs], rotation_block)
    signs = rotation.random_signs(seed, f"{name}/in", inputs)
    packed, scale = np.empty((outputs, inputs), np.int8), np.empty(outputs, np.float16)
    difference = energy = 0.0
    for start, stop in rotation.row_pieces((outputs, inputs)):
        rows = weight[start:stop]
        scales.check_finite(scales.row_norms(rows), name)
        rotated = rotation.hadamard_inputs(rows * signs, block)
        scale[start:stop] = _round_up(np.abs(rotated).max(axis=1) / np.float32(_LARGEST), name)
        step = scale[start:stop].astype(np.float32)[:, None]
        codes = np.rint(rotated / np.where(step == 0, np.float32(np.inf), step))
        packed[start:stop] = np.clip(codes, -_LARGEST, _LARGEST)
        # The rotation keeps norms, so the error can be measured before undoing it.
        error = (rotated - packed[start:stop] * step).astype(np.float64)
        difference += scales.sum_all(error * error)
        exact = rotated.astype(np.float64)
        energy += scales.sum_all(exact * exact)
    return QuantizedTensor(
        code="int8",
        bits_per_pair=INT8_BITS_PER_PAIR,
        shape=(outputs, inputs),
        packed=packed,
        scale=scale,
        input_scale=signs.astype(np.float16),
        input_block=block,
        relative_error=scales.ratio_of_norms(difference, energy),
    )


def _round_up(values: np.ndarray, name: str) -> np.ndarray:
    """The smallest float16 that is not less: float32 [n] -> float16 [n]."""
    nearest = scales.round_to_float16(values.astype(np.float64), name)
    too_small = nearest.astype(np.float32) < values
    higher = np.nextafter(nearest, np.float16(np.inf), dtype=np.float16)
    return scales.round_to_float16(np.where(too_small, higher, nearest).astype(np.float64), name)
