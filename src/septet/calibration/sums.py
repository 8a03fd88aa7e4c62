"""Sums of products over tokens, in float64: exact on the processor, by the GPU's own products where the tokens are there.

On the processor a sum must not depend on the number of threads, so its products are exact (`quantize.exact`). One GPU adds in the same
order every time, and another kind of GPU writes other text anyway. Several GPUs compute some rows of a sum each, all windows of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import torch

from septet.quantize import exact
from septet.quantize.hessian import HessianSum

__all__ = ["InputSum", "ProductSum", "block_grams"]

#: Rows of a sum that one GPU computes at a time; fixed, since products of another shape may round in another way.
_PANEL = 1024


class InputSum:
    """Adds up the Hessian of one fused group; see `HessianSum`.

    Args:
        inputs: in_features of the group.
        devices: where it is added up, "cpu" or GPUs; their number changes no bit. The first one has the result.
    """

    def __init__(self, inputs: int, devices: Sequence[str]) -> None:
        self._exact = HessianSum(inputs) if devices[0] == "cpu" else None
        self._sum = None if devices[0] == "cpu" else ProductSum(inputs, devices, torch.float64, symmetric=True)
        self._counts: list[torch.Tensor] = []

    @property
    def is_empty(self) -> bool:
        """Whether there were no tokens; a GPU is not asked how many of them it left out."""
        return not self._counts if self._exact is None else not self._exact.tokens

    def tokens(self, device: torch.device | str | None = None) -> int | torch.Tensor:
        """How many have been added, at least 1; from GPUs [], on one of them: None is the first."""
        if self._exact is not None:
            return max(self._exact.tokens, 1)
        return torch.stack([count.to(device or self._sum.device) for count in self._counts]).sum().clamp(min=1)

    def add(self, rows: torch.Tensor) -> None:
        """Add tokens, float32 [tokens, K]; rows that are not finite are left out."""
        if self._exact is not None:
            self._exact.add(rows.numpy())
            return
        finite = torch.isfinite(rows).all(1)
        self._counts.append(finite.sum())
        rows = rows.masked_fill(~finite[:, None], 0)
        self._sum.add(rows, rows)

    def mean(self) -> np.ndarray | torch.Tensor:
        """The Hessian per token, float64 [K, K]: an array, or a tensor on the GPU. A GPU's sum is used up."""
        return self._exact.mean() if self._exact is not None else self._sum.total().div_(self.tokens())


class ProductSum:
    """A sum of transpose(left) @ right over tokens. Its rows are dealt out to GPUs in panels that do not depend on how many there are.

    Args:
        size: columns of both sides, K.
        devices: GPUs; the first one has room for the whole sum, the others for their share.
        dtype: of the sum.
        symmetric: both sides are the same; what lies below the diagonal is not computed.
    """

    def __init__(self, size: int, devices: Sequence[str], dtype: torch.dtype, symmetric: bool = False) -> None:
        self.device, self._symmetric = devices[0], symmetric
        self._matrix = torch.zeros((size, size), dtype=dtype, device=self.device)
        #: (rows, columns, their sum) of each GPU.
        self._panels: dict[str, list[tuple[slice, slice, torch.Tensor]]] = {device: [] for device in devices}
        # There and back again, since panels of a symmetric sum become shorter.
        turns = [*devices, *reversed(devices)]
        for number, start in enumerate(range(0, size, _PANEL)):
            rows, columns = slice(start, min(start + _PANEL, size)), slice(start if symmetric else 0, size)
            device, part = turns[number % len(turns)], self._matrix[rows, columns]
            part = part if device == self.device else torch.zeros(part.shape, dtype=dtype, device=device)
            self._panels[device].append((rows, columns, part))

    def add(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add tokens, float32 [tokens, K] each, on any GPU."""
        # All copies are sent before any sum: a GPU gives away what it has in the order of its work.
        sides = (right,) if left is right else (left, right)
        there = {device: [side.to(device) for side in sides] for device, panels in self._panels.items() if panels}
        for device, sides in there.items():
            wide = [side.to(self._matrix.dtype) for side in sides]
            for rows, columns, part in self._panels[device]:
                part.addmm_(wide[0][:, rows].T, wide[-1][:, columns])

    def total(self) -> torch.Tensor:
        """The sum, [K, K] on the first GPU; it is used up."""
        for rows, columns, part in chain.from_iterable(self._panels.values()):
            # Panels of the first GPU are there already.
            if part.data_ptr() != self._matrix[rows, columns].data_ptr():
                self._matrix[rows, columns] = part.to(self._matrix.device)
            if self._symmetric:
                self._matrix[rows.stop :, rows] = self._matrix[rows, rows.stop :].T
        self._panels = {}
        return self._matrix


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
