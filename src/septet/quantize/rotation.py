"""Random signs and Hadamard blocks: they make the weights of any layer look like independent Gaussian numbers.

rotate:   W' = H_out (W / s_out / s_in) H_in        unrotate:   W = H_out W' H_in * s_out * s_in

H is block diagonal, normalized and symmetric, so it is its own inverse. All steps are float32, in the order written: divide by
s_out, divide by s_in, butterflies along the inputs, butterflies along the outputs; back: inputs, outputs, times s_out, times s_in.
Every backend computes the same butterflies, so the result has the same bits everywhere.

Reference: incoherence processing after Chee et al. 2023 (QuIP, arXiv 2307.13304) and Tseng et al. 2024 (QuIP#, arXiv 2402.04396).
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from septet.errors import OptionError
from septet.kernels import select_backend

__all__ = ["PIECE_WEIGHTS", "choose_block", "hadamard_inputs", "hadamard_outputs", "random_signs", "rotate", "unrotate"]

#: Rows are worked on in pieces of about this many weights, so that temporaries stay small.
PIECE_WEIGHTS = 1 << 20


def choose_block(sizes: list[int], cap: int) -> int:
    """The rotation block of an axis: the largest power of two that divides every size, at most the cap.

    Args:
        sizes: lengths of the axis in all tensors that must agree, each at least 1.
        cap: the largest block allowed, a power of two.

    Raises:
        OptionError: the cap is not a power of two.
    """
    if cap < 1 or cap & (cap - 1):
        raise OptionError("the rotation block must be a power of two", cap, "choose 1, 2, 4, ... 128, 256, 512")
    divisor = math.gcd(*sizes)
    return min(divisor & -divisor, cap)


def random_signs(seed: int, key: str, count: int) -> np.ndarray:
    """Signs that depend on nothing but their arguments.

    Args:
        seed: any integer.
        key: what the signs are for, such as "model.layers.0.mlp.down_proj/out".
        count: how many.

    Returns:
        float32 [count] of 1.0 and -1.0: the bits of SHAKE-256 of "seed/key", lowest bit of each byte first, 1 means -1.0.
    """
    digest = hashlib.shake_256(f"{seed}/{key}".encode()).digest(-(-count // 8))
    bits = np.unpackbits(np.frombuffer(digest, np.uint8), bitorder="little")[:count]
    return np.float32(1) - 2 * bits.astype(np.float32)


def hadamard_inputs(matrix: np.ndarray, block: int) -> np.ndarray:
    """Multiply float32 [N, K] by the block Hadamard matrix along its inputs."""
    return matrix if block == 1 else select_backend().hadamard(np.ascontiguousarray(matrix), block)


def hadamard_outputs(matrix: np.ndarray, block: int) -> np.ndarray:
    """Multiply float32 [N, K] by the block Hadamard matrix along its outputs."""
    if block == 1:
        return matrix
    result = np.empty_like(matrix)
    for start, stop in row_pieces(matrix.shape, block):
        columns = np.ascontiguousarray(matrix[start:stop].T)
        result[start:stop] = select_backend().hadamard(columns, block).T
    return result


def rotate(weight: np.ndarray, output_scale: np.ndarray, input_scale: np.ndarray, input_block: int, output_block: int) -> np.ndarray:
    """Rotate weights into the basis in which they are encoded.

    Args:
        weight: float32 [N, K].
        output_scale: float32 [N], s_out; rows with 0 must be dropped and become 0 before the butterflies.
        input_scale: float32 [K], s_in, none of them 0.
        input_block: Hadamard block that divides K.
        output_block: Hadamard block that divides N.

    Returns:
        float32 [N, K].
    """
    kept = output_scale != 0
    divisor = np.where(kept, output_scale, np.float32(1))[:, None]
    scaled = np.empty(weight.shape, np.float32)
    for start, stop in row_pieces(weight.shape, output_block):
        rows = weight[start:stop] / divisor[start:stop] / input_scale
        rows[~kept[start:stop]] = 0
        scaled[start:stop] = hadamard_outputs(hadamard_inputs(rows, input_block), output_block)
    return scaled


def unrotate(levels: np.ndarray, output_scale: np.ndarray, input_scale: np.ndarray, input_block: int, output_block: int) -> np.ndarray:
    """The inverse of `rotate`: float32 or int8 [N, K] in the rotated basis -> float32 [N, K]."""
    weight = np.empty(levels.shape, np.float32)
    for start, stop in row_pieces(levels.shape, output_block):
        rows = hadamard_inputs(levels[start:stop].astype(np.float32), input_block)
        rows = hadamard_outputs(rows, output_block)
        weight[start:stop] = rows * output_scale[start:stop, None] * input_scale
    return weight


def row_pieces(shape: tuple[int, ...], block: int = 1, weights: int = PIECE_WEIGHTS) -> list[tuple[int, int]]:
    """Cut the rows of a matrix into pieces of whole blocks, of about so many weights: [(start, stop), ...]."""
    step = max(block, weights // max(shape[1], 1) // block * block)
    return [(start, min(start + step, shape[0])) for start in range(0, shape[0], step)]
