"""Hadamard blocks and packed tiles in torch: each operation rounds on its own, so floats have the bits of `quantize.rotation`."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from septet.codes import trellis
from septet.codes.tile import PAIRS_PER_TILE, TILE_INPUTS, TILE_OUTPUTS, tile_bytes, tile_grid
from septet.quantize import QuantizedTensor

__all__ = ["dequantize", "hadamard", "pack", "rotate", "unrotate", "window_levels", "windows_of_packed"]

#: Bytes are taken apart for about so many tiles at a time.
_TILES_TO_UNPACK = 1 << 15


def hadamard(matrix: torch.Tensor, block: int, along_outputs: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply by the block Hadamard matrix.

    Args:
        matrix: float32 or float64 [N, K].
        block: a power of two that divides the side it goes along.
        along_outputs: along N instead of K.
        out: where to, contiguous, perhaps `matrix` itself; None: a new tensor.

    Returns:
        `out`; without one and with block 1 the matrix itself.
    """
    if out is None:
        out = matrix if block == 1 else torch.empty(matrix.shape, dtype=matrix.dtype, device=matrix.device)
    if matrix.is_cuda and block > 1:
        from septet.quantize_gpu import kernels

        if block * matrix.itemsize <= kernels.MOST_BLOCK_BYTES:
            return kernels.hadamard(matrix.contiguous(), block, along_outputs, out)
    if out is not matrix or block > 1:
        out.copy_(_butterflies(matrix.T, block).T if along_outputs else _butterflies(matrix, block))
    return out


def _butterflies(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """[N, K] along its inputs, one operation after the other."""
    values, stride = matrix, 1
    while stride < block:
        pairs = values.reshape(-1, block // (2 * stride), 2, stride)
        values = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        stride *= 2
    return values.reshape(matrix.shape) * (1 / math.sqrt(block))


def rotate(
    weight: torch.Tensor, output_scale: torch.Tensor, input_scale: torch.Tensor, input_block: int, output_block: int
) -> torch.Tensor:
    """`quantize.rotation.rotate`: float32 [N, K], [N] and [K] -> float32 [N, K]."""
    kept = output_scale != 0
    rows = weight / torch.where(kept, output_scale, torch.ones_like(output_scale))[:, None]
    rows /= input_scale
    rows[~kept] = 0
    return hadamard(hadamard(rows, input_block, out=rows), output_block, along_outputs=True, out=rows)


def unrotate(
    levels: torch.Tensor, output_scale: torch.Tensor, input_scale: torch.Tensor, input_block: int, output_block: int
) -> torch.Tensor:
    """The inverse of `rotate`: float32 or int8 [N, K] -> float32 [N, K]."""
    rows = levels.to(torch.float32, copy=True)
    hadamard(hadamard(rows, input_block, out=rows), output_block, along_outputs=True, out=rows)
    return rows.mul_(output_scale[:, None]).mul_(input_scale)


def dequantize(quantized: QuantizedTensor, device: str) -> torch.Tensor:
    """The weights that a tensor in code trellis stands for: float32 [N, K] on a device."""
    outputs, inputs = quantized.shape
    rows, columns = tile_grid(outputs, inputs)
    packed = torch.from_numpy(quantized.packed).to(device).reshape(rows, columns, tile_bytes(quantized.bits_per_pair))
    levels = torch.empty((rows, TILE_OUTPUTS, columns, TILE_INPUTS), dtype=torch.int8, device=device)
    table = window_levels(quantized.bits_per_pair, device)
    together = max(1, _TILES_TO_UNPACK // columns)
    for start in range(0, rows, together):
        windows = windows_of_packed(packed[start : start + together], quantized.bits_per_pair)
        levels[start : start + together] = table[windows].reshape(-1, columns, TILE_OUTPUTS, TILE_INPUTS).transpose(1, 2)
    dense = levels.reshape(rows * TILE_OUTPUTS, -1)[:outputs, :inputs]
    scale, input_scale = (torch.from_numpy(array.astype(np.float32)).to(device) for array in (quantized.scale, quantized.input_scale))
    return unrotate(dense, scale, input_scale, quantized.input_block, quantized.output_block)


def pack(symbols: torch.Tensor, bits: int) -> torch.Tensor:
    """Symbols to the bytes of tiles.

    Args:
        symbols: uint8 [..., 128], below 2^bits.
        bits: bits per pair.

    Returns:
        uint8 [..., 16 * bits].
    """
    single = (symbols[..., None] >> torch.arange(bits, dtype=torch.uint8, device=symbols.device)) & 1
    bytewise = single.reshape(*symbols.shape[:-1], tile_bytes(bits), 8)
    return (bytewise << torch.arange(8, dtype=torch.uint8, device=symbols.device)).sum(-1, dtype=torch.uint8)


def windows_of_packed(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The window of each pair: uint8 [..., 16 * bits] -> int32 [..., 128]."""
    single = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    split = single.reshape(*packed.shape[:-1], PAIRS_PER_TILE, bits).int()
    symbols = (split << torch.arange(bits, dtype=torch.int32, device=packed.device)).sum(-1, dtype=torch.int32)
    windows = symbols
    for distance in range(1, -(-trellis.WINDOW_BITS // bits)):
        windows = windows | symbols.roll(-distance, -1) << bits * distance
    return windows & (1 << trellis.WINDOW_BITS) - 1


@cache
def window_levels(bits: int, device: str) -> torch.Tensor:
    """The two levels of each window, int8 [65536, 2]."""
    return torch.from_numpy(np.array(trellis.window_levels(bits))).to(device)
