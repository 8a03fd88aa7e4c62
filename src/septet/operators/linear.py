"""septet::linear, the product of a packed layer, and septet::dequantize, its weights as floats."""

from __future__ import annotations

import numpy as np
import torch

from septet.errors import ShapeError
from septet.operators.description import SCHEMA, LayerDescription
from septet.operators.library import LIBRARY, TAGS, common_gpu
from septet.operators.prepared import Tensors, gpu_layer, layer_weights, prepared_layer
from septet.quantize import QuantizedTensor
from septet.quantize import dequantize as dequantize_arrays

__all__ = ["FLOAT_DTYPES", "dequantize", "linear"]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCTS = {"trellis": "linear_trellis", "split": "linear_split", "int8": "linear_int8"}
_TENSORS = "Tensor weight, Tensor weight_scale, Tensor? weight_input_scale, Tensor? weight_offset"

LIBRARY.define(f"linear(Tensor x, {_TENSORS}, {SCHEMA}) -> Tensor", tags=TAGS)
LIBRARY.define(f"dequantize({_TENSORS}, {SCHEMA}) -> Tensor", tags=TAGS)


def linear(x: torch.Tensor, tensors: Tensors, description: LayerDescription) -> torch.Tensor:
    """y = W x for packed W, without the bias.

    Args:
        x: float32, bfloat16 or float16 [..., K].
        tensors: weight, scale, input scale or None, offset or None, as stored.
        description: of the layer.

    Returns:
        [..., N], the dtype of `x`; computed in float32 and rounded once.

    Raises:
        OptionError, ShapeError: tensors, description and input do not fit together, or are on several devices.
    """
    return torch.ops.septet.linear(x, *tensors, *description)


def dequantize(tensors: Tensors, description: LayerDescription) -> torch.Tensor:
    """The weights that a packed layer stands for.

    Args:
        tensors: as for `linear`.
        description: of the layer.

    Returns:
        float32 [N, K].

    Raises:
        OptionError, ShapeError: the tensors contradict the description.
    """
    return torch.ops.septet.dequantize(*tensors, *description)


def _linear_cpu(x: torch.Tensor, *stored) -> torch.Tensor:
    """septet::linear on the CPU: the whole layer in one call of the backend."""
    tensors, description = _split(stored)
    _check_input(x, description)
    if x.numel() == 0:
        return _linear_fake(x, *stored)
    rows = x.detach() if x.requires_grad else x
    rows = rows.to(torch.float32).reshape(-1, description.in_features).contiguous()
    backend, prepared = prepared_layer(tensors, description)
    y = torch.from_numpy(getattr(backend, _PRODUCTS[description.code])(rows.numpy(), prepared, description.activations))
    y = y if x.ndim == 2 else y.reshape(*x.shape[:-1], description.out_features)
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def _linear_cuda(x: torch.Tensor, *stored) -> torch.Tensor:
    """septet::linear on a GPU."""
    tensors, description = _split(stored)
    _check_input(x, description)
    if x.numel() == 0:
        return _linear_fake(x, *stored)
    from septet.gpu import layers

    with common_gpu(x, *tensors):
        rows = x.detach().reshape(-1, description.in_features).contiguous()
        y = layers.linear(rows, tensors[0].detach(), gpu_layer(tensors, description), description.activations)
    return y.reshape(*x.shape[:-1], description.out_features)


def _linear_fake(x: torch.Tensor, *stored) -> torch.Tensor:
    """The result of septet::linear without its values."""
    _, description = _split(stored)
    _check_input(x, description)
    return x.new_empty((*x.shape[:-1], description.out_features))


def _dequantize_cpu(*stored) -> torch.Tensor:
    """septet::dequantize on the CPU."""
    tensors, description = _split(stored)
    layer = layer_weights(tensors, description)
    quantized = QuantizedTensor(
        code=layer.code,
        bits_per_pair=layer.bits_per_pair,
        shape=(layer.out_features, layer.in_features),
        packed=layer.packed,
        scale=layer.scale,
        offset=layer.offset,
        input_scale=layer.input_scale,
        input_block=layer.input_block,
        output_block=layer.output_block,
        group_size=layer.group_size,
    )
    return torch.from_numpy(np.ascontiguousarray(dequantize_arrays(quantized)))


def _dequantize_cuda(*stored) -> torch.Tensor:
    """septet::dequantize on a GPU."""
    tensors, description = _split(stored)
    from septet.gpu import layers

    with common_gpu(*tensors):
        return layers.dequantize(tensors[0].detach(), gpu_layer(tensors, description))


def _dequantize_fake(*stored) -> torch.Tensor:
    """The result of septet::dequantize without its values."""
    tensors, description = _split(stored)
    return tensors[0].new_empty((description.out_features, description.in_features), dtype=torch.float32)


def _split(stored: tuple) -> tuple[Tensors, LayerDescription]:
    """The arguments of the schema after `x`: four tensors, then the description."""
    return stored[:4], LayerDescription(*stored[4:])


def _check_input(x: torch.Tensor, description: LayerDescription) -> None:
    if x.dtype in FLOAT_DTYPES and x.ndim >= 1 and x.shape[-1] == description.in_features:
        return
    wanted = f"inputs must be float32, bfloat16 or float16 [..., {description.in_features}]"
    raise ShapeError(wanted, f"{x.dtype} {list(x.shape)}", "check in_features and the dtype of the model")


_IMPLEMENTATIONS = (
    ("linear", _linear_cpu, _linear_cuda, _linear_fake),
    ("dequantize", _dequantize_cpu, _dequantize_cuda, _dequantize_fake),
)

for _name, _cpu, _cuda, _fake in _IMPLEMENTATIONS:
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"septet::{_name}", _fake, lib=LIBRARY)
