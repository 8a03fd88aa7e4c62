"""Quantizing a model that transformers has just loaded, group by group, in place.

The groups, names and options are those of `septet quantize`, so the tensors are the same, byte for byte, as long as the model was
loaded in the dtype of its checkpoint. Memory peaks at the dense model plus one group; `septet quantize` needs only one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from septet.checkpoint.jobs import quantize_group
from septet.checkpoint.options import QuantizeOptions
from septet.errors import UnsupportedModelError
from septet.model import LayerPlan, Runtime, install
from septet.quantize.tensor import RowSource

__all__ = ["quantize_model"]


def quantize_model(model: nn.Module, layers: list[LayerPlan], options: QuantizeOptions, runtime: Runtime, progress=iter) -> dict[str, dict]:
    """Replace the planned layers of a model by quantized ones.

    Args:
        model: dense, with weights.
        layers: from `model.plan`.
        options: how to quantize.
        runtime: how the new modules compute.
        progress: wraps the list of groups, for a progress bar.

    Returns:
        Module name -> description, the table `layers` of a checkpoint.

    Raises:
        CodeRangeError: a weight is not finite or too large.
        UnsupportedModelError: a weight is not there: on the meta device, or offloaded.
    """
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    described = {}
    for group in progress(list(groups.values())):
        matrices = [_matrix(model, layer) for layer in group]
        quantized = quantize_group(group, matrices, options)
        del matrices
        for layer, result in zip(group, quantized):
            described[layer.name] = result.config() | layer.config()
            install(model, layer, result, runtime)
    return described


@dataclass(frozen=True)
class _Rows:
    """A tensor of any float dtype, anywhere, that hands out rows as float32 arrays."""

    tensor: torch.Tensor
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return tuple(self.tensor.shape)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self.tensor[rows].to("cpu", torch.float32).contiguous().numpy()


def _matrix(model: nn.Module, layer: LayerPlan) -> RowSource:
    """The weight of a layer, [N, K]."""
    weight = model.get_submodule(layer.source or layer.name).weight.detach()
    if weight.device.type == "meta":
        hint = "load it without device_map, or use `septet quantize`"
        raise UnsupportedModelError("weights must be in memory to be quantized", f"{layer.name} elsewhere", hint)
    return _Rows(weight.T if layer.kind == "conv1d" else weight)
