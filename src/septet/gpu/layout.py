"""The order of packed trellis bytes that product.cu reads, made from the stored order once.

A unit is 64 outputs x 64 inputs, 16 tiles. In it, lane 4g + t holds outputs 8g .. 8g+7 of tiles 4t .. 4t+3: four chunks of 2*b
bytes. Chunks of neighbouring tiles are joined in pairs so that each fills whole 32-bit words: with 7 bits the second pair's bytes
12 and 13 follow the first's. Then words of all lanes lie side by side, four of them per lane where possible, so that a warp
reads whole cache lines. The bytes of a unit stay together and none is added, but for inputs rounded up to 64.
"""

from __future__ import annotations

import torch

from septet.codes.tile import TILE_INPUTS, tile_bytes

__all__ = ["UNIT_INPUTS", "arrange", "units_of"]

UNIT_INPUTS = 64
_TILES = UNIT_INPUTS // TILE_INPUTS


def units_of(in_features: int) -> int:
    """Units along the inputs."""
    return -(-in_features // UNIT_INPUTS)


def arrange(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Packed bytes in the order of the lanes.

    Args:
        packed: uint8 [R, T*16*bits] as stored.
        bits: bits per pair.

    Returns:
        uint8 [R * units * 1024 * bits / 4], 16-byte aligned.
    """
    rows, size = len(packed), tile_bytes(bits)
    tiles = packed.shape[1] // size
    units = -(-tiles // _TILES)
    padded = torch.nn.functional.pad(packed, (0, (units * _TILES - tiles) * size))
    # [unit, t, pair of tiles, tile of the pair, g, byte] -> [unit, g, t, pair, tile of the pair, byte]
    chunks = padded.reshape(rows * units, 4, 2, 2, 8, 2 * bits).permute(0, 4, 1, 2, 3, 5)
    first, second = chunks[..., 0, :], chunks[..., 1, :]
    whole = bits // 2 * 4
    joined = torch.cat([first[..., :whole], first[..., whole:], second[..., whole:], second[..., :whole]], dim=-1)
    lanes = joined.reshape(rows * units, 32, 8 * bits)
    vectors = bits // 2
    wide = lanes[..., : vectors * 16].reshape(rows * units, 32, vectors, 16).transpose(1, 2).reshape(rows * units, -1)
    narrow = lanes[..., vectors * 16 :].reshape(rows * units, -1)
    return torch.cat([wide, narrow], dim=1).reshape(-1)
