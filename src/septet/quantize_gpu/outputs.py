"""What is known of a group's outputs, on a GPU: the factors that error feedback between tiles goes by.

A factor takes more than a hundred small kernels, and a group has a factor for each thousand outputs. Sending them one by one takes several
times as long as computing them, and threads that send to several GPUs would wait for each other: a GPU gets them as one CUDA graph.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from septet.codes.tile import TILE_OUTPUTS
from septet.quantize.statistics import OUTPUT_DAMPINGS
from septet.quantize_gpu.factorization import Factor, attempt_factor, decompose
from septet.quantize_gpu.graphs import Repeated
from septet.quantize_gpu.statistics import as_coded

__all__ = ["OutputFactors"]

#: One thread at a time: torch loads its linear algebra at the first call, and fails where two call first.
_MAKING = threading.Lock()


class OutputFactors:
    """The factors of blocks of outputs, for feedback between their tiles; see `quantize.statistics.output_factor`.

    Nothing waits for the GPU before they are asked for.

    Args:
        blocks: of each the sensitivity, float [B, B], of B neighbouring outputs, or None; and signed s_out, float64 [B].
        block: Hadamard block that divides B.
        device: where to compute.
    """

    def __init__(self, blocks: Sequence[tuple[np.ndarray | None, np.ndarray]], block: int, device: str) -> None:
        self._block, self._device, self._count = block, device, len(blocks)
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._attempts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for number, (sensitivity, scale) in enumerate(blocks):
            if sensitivity is not None and len(sensitivity) > TILE_OUTPUTS:
                known = self._known[number] = torch.from_numpy(sensitivity), torch.from_numpy(scale)
                with _MAKING:
                    attempt = _attempts(len(sensitivity), known[0].dtype, block, device)
                self._attempts[number] = attempt(*known)

    def result(self) -> list[Factor | None]:
        """None where the sensitivity is not known or of no use, or all outputs are in one tile."""
        made: list[Factor | None] = [None] * self._count
        found = torch.stack([found for _, found in self._attempts.values()]).tolist() if self._attempts else []
        for (number, (matrix, _)), (fits, shift) in zip(self._attempts.items(), found):
            made[number] = Factor(matrix, shift) if fits else self._with_more_damping(number)
        return made

    def _with_more_damping(self, number: int) -> Factor | None:
        sensitivity, scale = (tensor.to(self._device, copy=True).double() for tensor in self._known[number])
        damped = decompose(as_coded(sensitivity, scale, self._block), OUTPUT_DAMPINGS[1:])
        return None if damped is None else damped.factor(TILE_OUTPUTS)


class _Attempts:
    """Factors of sensitivities of one size, with the first damping.

    Args:
        size: outputs, B.
        dtype: of the sensitivities.
        block: Hadamard block.
        device: where; the thread's current one.
    """

    def __init__(self, size: int, dtype: torch.dtype, block: int, device: str) -> None:
        self._block = block
        self._sensitivity = torch.eye(size, dtype=dtype, device=device)
        self._scale = torch.ones(size, dtype=torch.float64, device=device)
        self._matrix = torch.empty((size, size), dtype=torch.float64, device=device)
        self._found = torch.empty(2, dtype=torch.int64, device=device)
        self._graph = Repeated(self._attempt, torch.device(device))
        # Run and recorded here, where nothing depends on it.
        self._graph()
        self._graph()

    def __call__(self, sensitivity: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A matrix and what `attempt_factor` says of it, neither waited for."""
        self._sensitivity.copy_(sensitivity, non_blocking=True)
        self._scale.copy_(scale, non_blocking=True)
        self._graph()
        return self._matrix.clone(), self._found.clone()

    def _attempt(self) -> None:
        self._matrix.copy_(self._sensitivity)
        as_coded(self._matrix, self._scale, self._block)
        self._found.copy_(attempt_factor(self._matrix, OUTPUT_DAMPINGS[0], TILE_OUTPUTS))


#: A few sizes for each GPU; one of 1024 outputs takes about 0.1 GB.
_attempts = lru_cache(16)(_Attempts)
