"""A step of error feedback as three kernels: targets, search, errors. The search is that of `clusters`, the others are in step.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from septet.codes import trellis
from septet.codes.tile import TILE_OUTPUTS, WEIGHTS_PER_TILE
from septet.gpu.compiled import options_of
from septet.gpu.driver import Kernel, compile_source, load_kernel
from septet.quantize.factorization import ERROR_BITS
from septet.quantize.feedback import ERROR_SHIFT
from septet.quantize_gpu import clusters
from septet.quantize_gpu.rotation import window_levels

__all__ = ["Arguments", "Steps", "source_of"]

_TENSORS = ("weights", "errors", "mixed", "levels", "symbols", "before", "local", "recent", "real_rows", "real_columns", "now", "delays")
_OWN = ("across", "strides", "later", "per_output", "fixed", "asked", "windows", "table", "per_input")
#: Blocks of `target` for each row of tiles: eight warps of two outputs each.
_BLOCKS_OF_TARGET = TILE_OUTPUTS // 16


class Arguments(ctypes.Structure):
    """Arguments of step.cu."""

    _fields_ = [*((name, ctypes.c_void_p) for name in (*_TENSORS, *_OWN)), ("columns", ctypes.c_int)]


class Steps:
    """The steps of sheets on one GPU.

    Args:
        tensors: the state by the names in step.cu, contiguous, where it stays; `errors` and `mixed` may be one.
        across: of rows of tiles whose outputs know each other: (first row of tiles, contiguous coefficients int32 [sheets, R, 64, R * 64],
            float64 [sheets] what to multiply sums by).
        per_input: what to multiply sums over inputs by, float64 [].
        bits: bits per pair.
    """

    def __init__(
        self, tensors: dict[str, torch.Tensor], across: Sequence[tuple[int, torch.Tensor, torch.Tensor]], per_input: torch.Tensor, bits: int
    ) -> None:
        weights = tensors["weights"]
        device, self._tiles, self._bits = weights.device, len(weights), bits
        pointers, strides, later = np.zeros(self._tiles, np.int64), np.zeros(self._tiles, np.int32), np.zeros(self._tiles, np.int32)
        per_output = torch.zeros(self._tiles, dtype=torch.float64, device=device)
        for first, coefficients, scales in across:
            sheets, rows, _, stride = coefficients.shape
            part, row = slice(first, first + sheets * rows), np.tile(np.arange(rows), sheets)
            per_output[part] = scales.repeat_interleave(rows)
            skipped = np.arange(len(row)) * TILE_OUTPUTS * stride + (row + 1) * TILE_OUTPUTS
            pointers[part] = coefficients.data_ptr() + skipped * coefficients.itemsize
            strides[part], later[part] = stride, rows - 1 - row
        self._fixed = torch.empty((self._tiles, WEIGHTS_PER_TILE), dtype=torch.int16, device=device)
        own = {
            "across": torch.from_numpy(pointers).to(device, non_blocking=True),
            "strides": torch.from_numpy(strides).to(device, non_blocking=True),
            "later": torch.from_numpy(later).to(device, non_blocking=True),
            "per_output": per_output,
            "fixed": self._fixed,
            "asked": torch.zeros((self._tiles, WEIGHTS_PER_TILE), dtype=torch.float64, device=device),
            "windows": torch.empty((self._tiles, WEIGHTS_PER_TILE // 2), dtype=torch.int32, device=device),
            "table": window_levels(bits, str(device)),
            "per_input": per_input,
        }
        self._windows = own["windows"]
        # The kernels know addresses only.
        self._kept = tensors, own, [coefficients for _, coefficients, _ in across]
        addresses = {name: tensor.data_ptr() for name, tensor in (tensors | own).items()}
        self._arguments = Arguments(**addresses, columns=weights.shape[1])
        width = tensors["before"].shape[-1]
        clusters.make_ready(self._tiles, bits, device)
        self._target, self._accept = (_kernel(device.index, name, bits, width) for name in ("target", "accept"))

    def step(self, number: int) -> None:
        """Step `number` of a batch."""
        stream = torch.cuda.current_stream(self._fixed.device).cuda_stream
        self._target.launch((self._tiles, _BLOCKS_OF_TARGET), stream, self._arguments, number)
        clusters.encode_from_both_ends(self._fixed, self._bits, self._windows)
        self._accept.launch((self._tiles, 1), stream, self._arguments, number)


def source_of(bits: int, width: int) -> str:
    """The source for batches of so many inputs."""
    macros = {"WIDTH": width, "BITS": bits, "LIMIT": trellis.FIXED_LIMIT, "PER_LEVEL": trellis.FIXED_PER_LEVEL}
    macros |= {"SHIFT": ERROR_SHIFT, "LARGEST": 1 << ERROR_BITS}
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    return "\n".join([*lines, (Path(__file__).parent / "step.cu").read_text()])


@cache
def _image(device: int, bits: int, width: int) -> bytes:
    # Products and sums are exact here, but targets are rounded: no contraction, as in torch.
    return compile_source(source_of(bits, width), (*options_of(device), "--fmad=false"))


@cache
def _kernel(device: int, name: str, bits: int, width: int) -> Kernel:
    return load_kernel(_image(device, bits, width), name, (Arguments, ctypes.c_int), WEIGHTS_PER_TILE)
