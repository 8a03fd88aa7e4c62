"""Putting packed modules into a model, and dense ones back.

`replace_modules` prepares a model on the meta device for loading a checkpoint; `install` swaps one dense layer for its quantized form;
`restore_modules` goes back. Biases stay the very parameters they were, since some models tie them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from septet.errors import CheckpointError, OptionError
from septet.layer import SeptetEmbedding, SeptetLinear, SeptetModule
from septet.model.plan import LayerPlan, dense_kind, dense_shape, is_scaled_embedding
from septet.quantize import QuantizedTensor

__all__ = ["Runtime", "install", "replace_modules", "restore_modules", "septet_modules", "set_activations", "tied_names"]

_ACTIVATIONS = ("int8", "float")


@dataclass(frozen=True)
class Runtime:
    """How new modules compute.

    Args:
        activations: "int8" or "float".
        activation_scale: "token" or "block".
        dtype: of the model; None is float16.
    """

    activations: str = "int8"
    activation_scale: str = "token"
    dtype: torch.dtype | None = None


def replace_modules(model: nn.Module, layers: Mapping[str, Mapping[str, object]], runtime: Runtime) -> None:
    """Replace dense modules by packed ones without weights, on the meta device.

    Args:
        model: dense.
        layers: module name -> description, the table `layers` of a checkpoint; "tied" lists modules that share the matrix.
        runtime: how the new modules compute.

    Raises:
        CheckpointError: a name is not in the model, or is a module of another kind or shape than the description says.
    """
    for name, entry in layers.items():
        owner = _replace(model, name, entry, runtime)
        for tied in tied_names(entry, name):
            _replace(model, tied, entry, runtime).share(owner)


def install(model: nn.Module, layer: LayerPlan, quantized: QuantizedTensor, runtime: Runtime) -> None:
    """Replace a dense layer, and what is tied to it, by its quantized form, on the same device."""
    device = model.get_submodule(layer.name).weight.device
    owner = _replace(model, layer.name, quantized.config(), runtime)
    owner.fill(quantized, device)
    for tied in layer.tied_names:
        _replace(model, tied, quantized.config(), runtime).share(owner)


def restore_modules(model: nn.Module, dtype: torch.dtype) -> None:
    """Put the dense modules back that `replace_modules` or `install` took out, with the values of the packed ones.

    Args:
        model: any.
        dtype: of the new weights.
    """
    made: dict[int, nn.Parameter] = {}
    for name, packed in list(septet_modules(model)):
        dense = packed.replaced[0]
        if id(packed.weight) not in made:
            weight = packed.dequantize().to(dtype)
            transposed = isinstance(packed, SeptetLinear) and packed.transposed
            made[id(packed.weight)] = nn.Parameter(weight.T.contiguous() if transposed else weight, requires_grad=False)
        dense.weight = made[id(packed.weight)]
        if isinstance(packed, SeptetLinear):
            dense.bias = packed.bias
        elif packed.factor is not None and packed.factor_in_dtype:
            dense.embed_scale = torch.tensor(packed.factor, device=dense.weight.device)
        model.set_submodule(name, dense.train(packed.training))


def septet_modules(model: nn.Module) -> Iterator[tuple[str, SeptetModule]]:
    """Name and module of every packed module, in the order of the model."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, SeptetModule))


def set_activations(model: nn.Module, activations: str) -> None:
    """Let all packed layers round their activations ("int8") or not ("float") from now on.

    Raises:
        OptionError: another value.
    """
    if activations not in _ACTIVATIONS:
        raise OptionError("activations must be int8 or float", activations, "choose one of the two")
    for _, module in septet_modules(model):
        if isinstance(module, SeptetLinear):
            module.activations = activations


def _replace(model: nn.Module, name: str, entry: Mapping[str, object], runtime: Runtime) -> SeptetModule:
    """Put a packed module on the meta device in the place of a dense one."""
    dense = _dense_module(model, name)
    if dense_kind(dense) == "embedding":
        packed: SeptetModule = SeptetEmbedding(entry, name, runtime.dtype, "meta")
        if is_scaled_embedding(dense):
            packed.factor_in_dtype = isinstance(dense.embed_scale, torch.Tensor)
            packed.factor = float(getattr(dense, "scalar_embed_scale", dense.embed_scale))
    else:
        packed = SeptetLinear(entry, name, dense.bias, runtime.dtype, "meta")
        packed.transposed = dense_kind(dense) == "conv1d"
        packed.activations, packed.activation_scale = runtime.activations, runtime.activation_scale
    if packed.shape != dense_shape(dense):
        hint = "config.json and the model's architecture do not belong together; fetch the checkpoint again"
        raise CheckpointError(f"{name} must have the shape {list(dense_shape(dense))} that the model asks for", list(packed.shape), hint)
    model.set_submodule(name, packed.train(dense.training))
    dense.weight = None
    if isinstance(packed, SeptetLinear):
        dense.bias = None
    packed.replaced = (dense,)
    return packed


def _dense_module(model: nn.Module, name: str) -> nn.Module:
    """The module of a name from a checkpoint, which may be wrong."""
    hint = "config.json and the model's architecture do not belong together; fetch the checkpoint again"
    try:
        module = model.get_submodule(name) if name else None
    except AttributeError:
        module = None
    if module is None:
        raise CheckpointError("layers of config.json must be modules of the model", repr(name), hint)
    if dense_kind(module) is None:
        raise CheckpointError(f"{name} must be a linear layer or an embedding", type(module).__name__, hint)
    return module


def tied_names(entry: Mapping[str, object], name: str) -> list[str]:
    """The modules that share a layer's matrix, from its description in a checkpoint.

    Raises:
        CheckpointError: the description does not list names.
    """
    tied = entry.get("tied", [])
    if not isinstance(tied, list | tuple) or not all(isinstance(other, str) for other in tied):
        raise CheckpointError(f"tied of {name} must list module names", repr(tied), "fetch config.json again")
    return list(tied)
