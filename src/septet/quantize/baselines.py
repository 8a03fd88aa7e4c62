"""Plain integer quantizers to compare with: INT8, INT4, INT3; symmetric or asymmetric; per channel or per group.

They are what the names mean in the field, with the same care as ours: fp16 scales and offsets, rounded before use, a true range
for every row or group, and all metadata counted. Nothing is packed; `bits_per_weight` says what a dense packing would cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet.errors import OptionError
from septet.quantize.scales import round_to_float16

__all__ = ["Baseline", "quantize_baseline"]


@dataclass(frozen=True, eq=False)
class Baseline:
    """What a baseline made of a matrix.

    Args:
        weight: float32 [N, K], dequantized.
        bits_per_weight: code bits plus fp16 scales and offsets, per weight.
    """

    weight: np.ndarray
    bits_per_weight: float


def quantize_baseline(weight: np.ndarray, bits: int, symmetric: bool, group_size: int | None = None, clip: float = 1.0) -> Baseline:
    """Round to 2^bits equidistant levels.

    Args:
        weight: float32 [N, K], finite.
        bits: 2..8.
        symmetric: levels -(2^(bits-1) - 1)..2^(bits-1) - 1 times a scale of absmax / (2^(bits-1) - 1); otherwise 2^bits levels from
            the minimum to the maximum.
        group_size: inputs that share a scale; None is the whole row. It must divide K.
        clip: shrink the range by this factor before rounding, 0..1.

    Raises:
        OptionError: bits or group size cannot be used.
    """
    if not 2 <= bits <= 8:
        raise OptionError("a baseline must have 2..8 bits", bits, "use 3, 4 or 8")
    outputs, inputs = weight.shape
    width = group_size or inputs
    if inputs % width:
        raise OptionError(f"group_size must divide the {inputs} inputs", width, "use another group size, or none")
    units = weight.reshape(-1, width)
    rounded = _symmetric(units, bits, clip) if symmetric else _asymmetric(units, bits, clip)
    metadata = (16 if symmetric else 32) / width
    return Baseline(rounded.reshape(outputs, inputs), bits + metadata)


def _symmetric(units: np.ndarray, bits: int, clip: float) -> np.ndarray:
    largest = 2 ** (bits - 1) - 1
    scale = _step(np.abs(units).max(axis=1) * clip / largest)
    return np.clip(np.rint(units / _divisor(scale)), -largest, largest) * scale


def _asymmetric(units: np.ndarray, bits: int, clip: float) -> np.ndarray:
    largest = 2**bits - 1
    low, high = units.min(axis=1) * clip, units.max(axis=1) * clip
    scale, offset = _step((high - low) / largest), _step(low)
    return np.clip(np.rint((units - offset) / _divisor(scale)), 0, largest) * scale + offset


def _step(values: np.ndarray) -> np.ndarray:
    """float [U] -> float32 [U, 1], rounded to fp16."""
    return round_to_float16(values.astype(np.float64), "the baseline").astype(np.float32)[:, None]


def _divisor(scale: np.ndarray) -> np.ndarray:
    """The scale, or infinity where it is 0, so that the code becomes 0."""
    return np.where(scale == 0, np.float32(np.inf), scale)
