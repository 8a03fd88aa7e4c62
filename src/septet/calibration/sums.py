"""Sums of products over tokens, in float64: exact on the processor, by the GPU's own products where the tokens are there.

On the processor a sum must not depend on the number of threads, so its products are exact (`quantize.exact`). One GPU adds in the same
order every time, and another kind of GPU writes other text anyway.
"""

from __future__ import annotations

import numpy as np
import torch

from septet.quantize import exact
from septet.quantize.hessian import HessianSum

__all__ = ["InputSum", "block_grams"]


class InputSum:
    """Adds up the Hessian of one fused group; see `HessianSum`.

    Args:
        inputs: in_features of the group.
        device: where the tokens are.

    Attributes:
        tokens: how many have been added.
    """

    def __init__(self, inputs: int, device: str) -> None:
        self._exact = HessianSum(inputs) if device == "cpu" else None
        self._sum = None if device == "cpu" else torch.zeros((inputs, inputs), dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, rows: torch.Tensor) -> None:
        """Add tokens, float32 [tokens, K]; rows that are not finite are left out."""
        if self._exact is not None:
            self._exact.add(rows.numpy())
            self.tokens = self._exact.tokens
            return
        wide = rows[torch.isfinite(rows).all(1)].double()
        self._sum.addmm_(wide.T, wide)
        self.tokens += len(wide)

    def mean(self) -> np.ndarray | torch.Tensor:
        """The Hessian per token, float64 [K, K]: an array, or a tensor on the GPU. A GPU's sum is used up."""
        return self._exact.mean() if self._exact is not None else self._sum.div_(max(self.tokens, 1))


def block_grams(rows: torch.Tensor, blocks: int) -> torch.Tensor:
    """For blocks of neighbouring columns, transpose(block) @ block.

    Args:
        rows: float32 [tokens, N].
        blocks: how many, divides N.

    Returns:
        float64 [blocks, N / blocks, N / blocks].
    """
    parts = rows.reshape(len(rows), blocks, -1)
    if rows.device.type == "cpu":
        return torch.from_numpy(np.stack([exact.gram(np.ascontiguousarray(parts[:, block].numpy())) for block in range(blocks)]))
    wide = parts.permute(1, 0, 2).double()
    return wide.transpose(1, 2) @ wide
