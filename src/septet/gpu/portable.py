"""Whole layers in Triton and torch operations: every code, width, block and kind of activations, on any device Triton knows.

It is the path for what the CUDA kernels do not take, and SEPTET_GPU=triton makes it the only one. Under TRITON_INTERPRET=1 it runs
on the CPU, which is how it is tested without a GPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from septet.codes.tile import TILE_INPUTS
from septet.codes.trellis import LEVEL_TABLE, WIDTHS
from septet.gpu import triton_kernels as kernels

__all__ = ["dense", "hadamard", "level_table", "packed", "round_activations"]

_OUTPUTS, _TOKENS, _PAIRS = 64, 16, 32
#: Of `dense`: tokens, outputs and inputs of a program, and how Triton compiles it; measured on an H100.
_FEW_TOKENS = (16, 64, 256), {"num_warps": 4, "num_stages": 4}
_MANY_TOKENS = (128, 128, 128), {"num_warps": 8, "num_stages": 3}
_FLOAT_BLOCK = (16, 64, 32), {"num_warps": 4, "num_stages": 3}


def hadamard(x: torch.Tensor, block: int) -> torch.Tensor:
    """Rotate blocks of the last axis, with the bits of `kernels.reference.hadamard`.

    Args:
        x: float32 [M, K].
        block: a power of two that divides K.

    Returns:
        float32 [M, K].
    """
    values, half = x, 1
    while half < block:
        pairs = values.reshape(len(x), -1, 2, half)
        values = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        half *= 2
    return values.reshape(x.shape) * float(np.float32(1 / math.sqrt(block)))


def round_activations(x: torch.Tensor, segment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to int8, with the bits of `kernels.reference.quantize_activations`.

    Args:
        x: float32 [M, K].
        segment: inputs that share a scale.

    Returns:
        int8 [M, K] and float32 [M, ceil(K/segment)].
    """
    count = -(-x.shape[1] // segment)
    padded = torch.nn.functional.pad(x, (0, count * segment - x.shape[1])).reshape(len(x), count, segment)
    # amax passes NaN on
    largest = padded.abs().amax(dim=2)
    finite = torch.isfinite(largest)
    rounded = torch.round(padded * (torch.full_like(largest, 127) / largest)[:, :, None]).clamp(-127, 127)
    whole = torch.where(finite[:, :, None] & (padded != 0), rounded, 0).to(torch.int8)
    scale = torch.where(finite, largest / torch.full_like(largest, 127), torch.nan)
    return whole.reshape(len(x), -1)[:, : x.shape[1]].contiguous(), scale


def level_table(device: torch.device) -> torch.Tensor:
    """T as int8 [128] on a device."""
    return torch.tensor(LEVEL_TABLE, dtype=torch.int8, device=device)


def packed(
    weight: torch.Tensor,
    table: torch.Tensor,
    activations: tuple[torch.Tensor, torch.Tensor | None],
    bits: int,
    outputs: int,
    segment: int,
    split: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Product with packed weights as stored.

    Args:
        weight: uint8 [R, T*16*bits].
        table: from `level_table`.
        activations: [M, K], int8 with scales float32 [M, segments], or float32 and None; K rounded up to whole tiles is T*4.
        bits: bits per pair.
        outputs: N.
        segment: inputs that share a scale (split: a group).
        split: scale and offset or None, float32 [N or 1, 2*segments]; None is code trellis.

    Returns:
        float32 [M, N].
    """
    x, x_scale = activations
    tokens, inputs = x.shape
    tiles = weight.shape[1] // (16 * bits)
    segment = min(segment, tiles * TILE_INPUTS)
    segments = -(-tiles * TILE_INPUTS // segment)
    y = torch.empty((tokens, outputs), dtype=torch.float32, device=x.device)
    scale, offset = split or (None, None)
    sums = None
    if offset is not None:
        sums = _sums_of_segments(x, segment, segments)
    grid = (-(-outputs // _OUTPUTS), -(-tokens // _TOKENS))
    kernels.packed_product[grid](
        weight, table, x, x_scale, scale, offset, sums, y, inputs, outputs, tiles, segment, segments, tokens,
        0 if scale is None or len(scale) == 1 else 2 * segments,
        BITS=bits, MULTIPLIER=WIDTHS[bits].multiplier, SPLIT=split is not None, OFFSET=offset is not None, FLOAT=x_scale is None,
        OUTPUTS=_OUTPUTS, TOKENS=_TOKENS, PAIRS=_PAIRS, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def _sums_of_segments(x: torch.Tensor, segment: int, segments: int) -> torch.Tensor:
    """Sums of the even and of the odd inputs of each segment: float32 [M, 2*segments]."""
    wide = torch.float32 if x.dtype == torch.float32 else torch.int32
    padded = torch.nn.functional.pad(x, (0, segments * segment - x.shape[1])).reshape(len(x), segments, segment // 2, 2)
    return padded.sum(dim=2, dtype=wide).to(torch.float32).reshape(len(x), -1)


def dense(
    weight: torch.Tensor,
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    segment: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Product with a dense int8 matrix.

    Args:
        weight: int8 [N, K].
        x: [M, K], int8 with `x_scale`, float32 without.
        x_scale: float32 [M, segments] or None.
        row_scale: float32 [N], applied last, or None.
        segment: inputs that share an activation scale: a power of two, 32 to 256, or all of them.
        out: where the result shall be, float32 [M, N] with rows contiguous, or None.

    Returns:
        float32 [M, N].
    """
    (tokens, inputs), outputs = x.shape, len(weight)
    segments = -(-inputs // segment)
    y = torch.empty((tokens, outputs), dtype=torch.float32, device=x.device) if out is None else out
    is_float = x_scale is None
    block, options = _FLOAT_BLOCK if is_float else _FEW_TOKENS if tokens <= 32 else _MANY_TOKENS
    if segments > 1 and not is_float:
        block = *block[:2], segment
    grid = (-(-outputs // block[1]) * -(-tokens // block[0]),)
    kernels.dense_product[grid](
        weight, x, x_scale, row_scale, y, inputs, outputs, tokens, segments, x.stride(0), weight.stride(0), y.stride(0),
        ROW_SCALE=row_scale is not None, FLOAT=is_float, SEGMENTED=segments > 1 and not is_float,
        TOKENS=block[0], OUTPUTS=block[1], INPUTS=block[2], GROUP=8, enable_fp_fusion=False, **options,
    )  # fmt: skip
    return y
