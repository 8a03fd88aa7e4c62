"""septet::embedding: look up rows of an int8 matrix and undo their rotation."""

from __future__ import annotations

import numpy as np
import torch

from septet.errors import CodeRangeError
from septet.kernels import select_backend
from septet.operators.library import LIBRARY, TAGS, common_gpu

__all__ = ["embedding"]

LIBRARY.define(
    "embedding(Tensor indices, Tensor weight, Tensor weight_scale, Tensor weight_input_scale, int input_block) -> Tensor", tags=TAGS
)


def embedding(
    indices: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_input_scale: torch.Tensor, input_block: int
) -> torch.Tensor:
    """Rows of an int8 matrix, row r = s_in * H_in(scale_r * q_r).

    Args:
        indices: int32 or int64, any shape, 0..rows-1.
        weight: int8 [rows, K].
        weight_scale: float16 [rows].
        weight_input_scale: [K] of 1 and -1, any float dtype: the dtype of the result.
        input_block: Hadamard block, divides K.

    Returns:
        [..., K], computed in float32 and rounded once.

    Raises:
        CodeRangeError: an index is outside the matrix. On a GPU its row is NaN instead.
        OptionError: there, indices and weights on several devices.
    """
    return torch.ops.septet.embedding(indices, weight, weight_scale, weight_input_scale, input_block)


def _embedding_cpu(
    indices: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_input_scale: torch.Tensor, input_block: int
) -> torch.Tensor:
    """septet::embedding on the CPU; NumPy does the look-up, the backend the butterflies."""
    wanted = indices.reshape(-1)
    if len(wanted) == 0:
        return _embedding_fake(indices, weight, weight_scale, weight_input_scale, input_block)
    lowest, highest = int(wanted.min()), int(wanted.max())
    if lowest < 0 or highest >= len(weight):
        got = lowest if lowest < 0 else highest
        raise CodeRangeError(f"embedding indices must be 0..{len(weight) - 1}", got, "check that tokenizer and model belong together")
    rows = weight.detach()[wanted].to(torch.float32) * weight_scale.detach()[wanted].to(torch.float32)[:, None]
    rotated = select_backend().hadamard(np.ascontiguousarray(rows.numpy()), input_block)
    result = torch.from_numpy(rotated) * weight_input_scale.detach().to(torch.float32)
    return result.to(weight_input_scale.dtype).reshape(*indices.shape, weight.shape[1])


def _embedding_cuda(
    indices: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_input_scale: torch.Tensor, input_block: int
) -> torch.Tensor:
    """septet::embedding on a GPU, which is not waited for: an index outside gives NaN instead of an error."""
    if indices.numel() == 0:
        return _embedding_fake(indices, weight, weight_scale, weight_input_scale, input_block)
    from septet.gpu import layers

    stored = (tensor.detach() for tensor in (weight, weight_scale, weight_input_scale))
    with common_gpu(indices, weight, weight_scale, weight_input_scale):
        return layers.embedding(indices.reshape(-1), *stored, input_block).reshape(*indices.shape, weight.shape[1])


def _embedding_fake(
    indices: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor, weight_input_scale: torch.Tensor, input_block: int
) -> torch.Tensor:
    """The result of septet::embedding without its values."""
    return weight_input_scale.new_empty((*indices.shape, weight.shape[1]))


LIBRARY.impl("embedding", _embedding_cpu, "CPU")
LIBRARY.impl("embedding", _embedding_cuda, "CUDA")
torch.library.register_fake("septet::embedding", _embedding_fake, lib=LIBRARY)
