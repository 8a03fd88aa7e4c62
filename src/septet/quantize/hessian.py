"""Hessians of layers: which errors of weights matter for a layer's outputs.

The Hessian of a linear layer is H = mean over tokens of x transpose(x): rounding errors E of one output cost E H transpose(E). Layers of
a fused group read the same inputs and share it. In the coded basis inputs are x' = Hd (s_in x), so H' = Hd diag(s_in) H diag(s_in) Hd.
Sums go in the order of the tokens given, and every product is exact (see `exact`), so a Hessian has the same bits with any number of
threads.

Reference: Frantar et al. 2023 (GPTQ, arXiv 2210.17323); in a rotated basis Chee et al. 2023 (QuIP, arXiv 2307.13304).
"""

from __future__ import annotations

import numpy as np

from septet.errors import ShapeError
from septet.quantize import exact

__all__ = ["HessianSum", "rotate_hessian"]

_CHUNK_TOKENS = 2048


class HessianSum:
    """Adds up the Hessian of one fused group.

    Args:
        inputs: in_features of the group.

    Attributes:
        tokens: how many have been added.
    """

    def __init__(self, inputs: int) -> None:
        self._sum = np.zeros((inputs, inputs))
        self.tokens = 0

    def add(self, activations: np.ndarray) -> None:
        """Add tokens; how they are cut into calls changes the last bits, so cut them the same way every time.

        Args:
            activations: float32 [tokens, K]; rows that are not finite are left out.

        Raises:
            ShapeError: another number of inputs.
        """
        if activations.ndim != 2 or activations.shape[1] != len(self._sum):
            hint = "flatten windows to [tokens, in_features]"
            raise ShapeError(f"activations must be [tokens, {len(self._sum)}]", list(activations.shape), hint)
        finite = np.isfinite(activations).all(axis=1)
        kept = activations if finite.all() else activations[finite]
        self.tokens += len(kept)
        for start in range(0, len(kept), _CHUNK_TOKENS):
            self._sum += exact.gram(kept[start : start + _CHUNK_TOKENS])

    def mean(self) -> np.ndarray:
        """The Hessian per token: float64 [K, K]; zeros when no token was added."""
        return self._sum / max(self.tokens, 1)


def rotate_hessian(hessian: np.ndarray, input_scale: np.ndarray, block: int) -> np.ndarray:
    """The Hessian of the inputs as the code sees them.

    Args:
        hessian: float64 [K, K], symmetric.
        input_scale: float32 [K], s_in.
        block: Hadamard block that divides K.

    Returns:
        float64 [K, K], Hd diag(s_in) H diag(s_in) Hd.
    """
    scale = input_scale.astype(np.float64)
    rotated = hessian * scale[:, None]
    rotated *= scale
    inputs = len(rotated)
    _butterflies(rotated.reshape(inputs // block, block, inputs))
    _butterflies(rotated.reshape(inputs * inputs // block, block, 1))
    # Each side brings a factor 1 / sqrt(block); their product is a power of two.
    rotated /= block
    return rotated


def _butterflies(values: np.ndarray) -> None:
    """Multiply by the Sylvester matrix along the middle axis, in place: float64 [blocks, block, inner]."""
    blocks, block, inner = values.shape
    stride = 1
    while stride < block:
        pairs = values.reshape(blocks, block // (2 * stride), 2, stride, inner)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        difference = first - second
        first += second
        second[...] = difference
        stride *= 2
