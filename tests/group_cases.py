"""Fused groups of layers and what is known of them, for tests of the quantizer on GPUs, with processors in their place."""

from __future__ import annotations

import numpy as np
import torch

from septet import quantize_gpu
from septet.codes import trellis
from septet.kernels import select_backend
from septet.quantize import GroupStatistics, QuantizedTensor
from septet.quantize.statistics import output_rows

NAMES = ["block.q", "block.k"]


def encoder(fixed: torch.Tensor, bits: int) -> torch.Tensor:
    """The processor's encoder in place of the kernel."""
    symbols = select_backend().trellis_encode(fixed.numpy(), bits, 0)
    return torch.from_numpy(trellis.windows_of_symbols(symbols, bits).astype(np.int32))


def settings(bits: int = 7) -> quantize_gpu.Settings:
    return quantize_gpu.Settings(bits, 64, 5, "cpu", encoder)


def correlated(size: int, seed: int) -> np.ndarray:
    """A Hessian, float64 [size, size], of fewer samples than a full rank needs."""
    rows = np.random.default_rng(seed).standard_normal((size // 2 + 1, size)) * np.linspace(0.2, 3, size)
    rows[:, 1:] += 0.7 * rows[:, :-1]
    return rows.T @ rows / len(rows)


def known_of(inputs: int, outputs: list[int]) -> GroupStatistics:
    rows = [output_rows(count) for count in outputs]
    sides = tuple(
        np.stack([correlated(row, 10 + block) for block in range(count // row)]).astype(np.float32) for count, row in zip(outputs, rows)
    )
    return GroupStatistics(correlated(inputs, 1), 0.05 * correlated(inputs, 2), sides)


def weights_of(inputs: int, outputs: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal((count, inputs)).astype(np.float32) * 0.02 for count in outputs]


def assert_same(made: QuantizedTensor, expected: QuantizedTensor) -> None:
    for name, array in expected.tensors().items():
        assert np.array_equal(made.tensors()[name].view(np.uint8), array.view(np.uint8)), name
    assert made.config() == expected.config()
