"""A model around the moment when transformers fills it: names, ties, and checks of what arrived."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from septet.errors import CheckpointError
from septet.integrations.tensor_parallel import check_cuts
from septet.layer import PARTS
from septet.model import Runtime, replace_modules, septet_modules
from septet.model.replace import tied_names

__all__ = ["finish", "forget_companions", "prepare", "shapes_of", "tie", "untie"]

_COMPANIONS = tuple(part for part in PARTS if part != "weight")
_AGAIN = "fetch the checkpoint again"


def prepare(model: nn.Module, layers: Mapping[str, Mapping[str, object]], runtime: Runtime) -> None:
    """Put packed modules into a model on the meta device.

    Args:
        model: as its config describes it.
        layers: table of the checkpoint; names may have or lack the prefix of the base model.
        runtime: how the modules compute.

    Raises:
        CheckpointError: the layers are not those of the model.
    """
    if not layers:
        raise CheckpointError("a septet checkpoint must list its layers", "none in config.json", _AGAIN)
    found = {}
    for name, entry in layers.items():
        here = _name_in(model, name)
        if here is not None:
            tied = [_name_in(model, other) for other in tied_names(entry, name)]
            found[here] = {**entry, "tied": [other for other in tied if other is not None]}
        elif _belongs_here(model, name):
            hint = "config.json and the model's architecture do not belong together; fetch the checkpoint again"
            raise CheckpointError("layers of config.json must be modules of the model", repr(name), hint)
    replace_modules(model, found, runtime)
    tie(model, found)


def tie(model: nn.Module, layers: Mapping[str, Mapping[str, object]]) -> None:
    """Tell transformers which companions are tied, as it ties and saves parameters by name."""
    keys = getattr(model, "all_tied_weights_keys", None)
    if keys is None:
        return
    for name, entry in layers.items():
        for other in entry.get("tied", ()):
            for part in PARTS:
                if getattr(model.get_submodule(name), part) is not None:
                    keys[f"{other}.{part}"] = f"{name}.{part}"


def untie(model: nn.Module, head: str) -> None:
    """A head has got a matrix of its own, so saved models must say that nothing is tied; whatever else was tied gets its own copy."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
    keys = getattr(model, "all_tied_weights_keys", {})
    for key in [key for key in keys if key != f"{head}.weight"]:
        parent, _, last = key.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Parameter(model.get_parameter(key).detach().clone()))
    keys.clear()


def forget_companions(model: nn.Module) -> None:
    """Undo `tie` for modules that are dense again; the weights stay tied."""
    keys = getattr(model, "all_tied_weights_keys", {})
    for key in [key for key in keys if key.endswith(tuple(f".{part}" for part in _COMPANIONS))]:
        del keys[key]


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every parameter, to compare with after loading (transformers before 5.20 does not)."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def finish(model: nn.Module, shapes: Mapping[str, torch.Size], runtime: Runtime) -> None:
    """Check what was loaded, and give the parameters of packed modules their final form.

    Args:
        model: loaded.
        shapes: from `shapes_of`, before.
        runtime: how the modules compute.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or values than it must have.
        UnsupportedModelError: tensor parallelism cuts through a tile or a rotation block.
    """
    for name, parameter in model.named_parameters():
        if name in shapes and parameter.shape != shapes[name]:
            wanted = f"{name} must have the shape {list(shapes[name])} that the model asks for"
            raise CheckpointError(wanted, list(parameter.shape), "config.json and the weights do not belong together; fetch both again")
    for name, module in septet_modules(model):
        check_cuts(name, module)
        for part in PARTS:
            parameter = getattr(module, part)
            if parameter is None:
                continue
            parameter.requires_grad_(False)
            if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False):
                raise CheckpointError(f"the checkpoint must hold {name}.{part}", "no such tensor", _AGAIN)
        if module.code == "int8" and module.weight.device.type != "meta":
            _finish_signs(module.weight_input_scale, name, runtime.dtype)


def _finish_signs(signs: nn.Parameter, name: str, dtype: torch.dtype | None) -> None:
    """Signs must be signs, since they are kept in the model's dtype, which holds nothing else exactly."""
    if not bool((signs.abs() == 1).all()):
        raise CheckpointError(f"{name}.weight_input_scale must be 1 or -1", "other values", _AGAIN)
    if dtype is not None and signs.dtype != dtype:
        # transformers before 5.20 leaves the stored dtype where it renames a key.
        signs.data = signs.data.to(dtype)


def _name_in(model: nn.Module, name: str) -> str | None:
    """The name of a checkpoint's module in this model, which may be the base model of the saved one, or the other way round."""
    prefix = getattr(model, "base_model_prefix", "")
    names = (name, name.removeprefix(f"{prefix}.") if prefix else name, f"{prefix}.{name}")
    return next((candidate for candidate in names if _has_module(model, candidate)), None)


def _has_module(model: nn.Module, name: str) -> bool:
    try:
        return bool(name) and model.get_submodule(name) is not None
    except AttributeError:
        return False


def _belongs_here(model: nn.Module, name: str) -> bool:
    """Whether a layer should be in this model: not if it is outside of the base model, and this model is a base model."""
    prefix = getattr(model, "base_model_prefix", "")
    is_base = not prefix or not hasattr(model, prefix)
    return name.startswith(f"{prefix}.") if is_base and prefix else True
