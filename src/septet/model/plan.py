"""The plan: every layer of a model that will be quantized, in the order of the model, and how.

Quantized are all plain nn.Linear and Conv1D layers, plus the output head as the option `head` says. They stay as they are when
- the head or an embedding tied to it is meant (the head's own rule applies),
- the model asks to keep them in float32, or the caller to keep them,
- packing would not make them smaller than 16 bits a weight (a classifier of two classes is padded to 64 outputs).
Only names, types and shapes are looked at, so a model on the meta device does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from septet.codes.tile import tile_bytes, tile_grid
from septet.errors import UnsupportedModelError
from septet.kernels.weights import MAX_IN_FEATURES
from septet.model.groups import group_key

__all__ = ["LayerPlan", "PlanOptions", "dense_kind", "dense_shape", "is_scaled_embedding", "output_head", "plan", "tied_to_head"]

_INT8_BITS_PER_PAIR = 16
_HEAD_TRELLIS_BITS_PER_PAIR = 8


class PlanOptions(Protocol):
    """What a plan depends on; `checkpoint.QuantizeOptions` is one."""

    code: str
    bits_per_pair: int
    head: str


@dataclass(frozen=True)
class LayerPlan:
    """One layer to quantize.

    Args:
        name: module name; the packed weight is stored as `<name>.weight`.
        kind: "linear", "conv1d" (its weight is [K, N]) or "embedding".
        shape: (out_features, in_features).
        group: layers of one group are quantized together.
        code: "trellis", "split" or "int8".
        bits_per_pair: 6, 7, 8, or 16 for int8.
        role: "linear" or "head".
        tied_names: other modules that use the same matrix.
        source: the module whose weight is quantized, if it is another one: a head that was tied and will not be any more.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    group: str
    code: str
    bits_per_pair: int
    role: str = "linear"
    tied_names: tuple[str, ...] = ()
    source: str | None = None

    def config(self) -> dict[str, object]:
        """What of it stands in the layer's entry of config.json, beside `QuantizedTensor.config`."""
        described: dict[str, object] = {"role": self.role}
        if self.tied_names:
            described["tied"] = list(self.tied_names)
        if self.kind == "conv1d":
            described["transposed"] = True
        return described


def plan(model: nn.Module, options: PlanOptions, keep: Iterable[str] = ()) -> list[LayerPlan]:
    """List the layers to quantize.

    Args:
        model: with or without weights.
        options: code, bits per pair, and what happens to the head.
        keep: modules to leave as they are: dotted names, or parts of them such as "down_proj" or "layers.0".

    Returns:
        The layers in the order of the model, the members of a group next to each other.

    Raises:
        UnsupportedModelError: there is nothing to quantize, or a kind of layer that is not handled yet holds most of the model.
    """
    kept = [*keep, *(getattr(model, "_keep_in_fp32_modules", None) or ()), *(getattr(model, "_keep_in_fp32_modules_strict", None) or ())]
    head = _plan_head(model, options, kept)
    tied = tied_to_head(model)
    layers = []
    for name, module in model.named_modules():
        _refuse_fused_experts(name, module)
        if head is not None and name == head.name:
            layers.append(head)
        elif name not in tied and not _is_kept(name, kept):
            layers += _plan_linear(name, module, options)
    if not layers:
        hint = "septet quantizes nn.Linear and Conv1D layers"
        raise UnsupportedModelError("a model must have layers that can be quantized", f"none in {type(model).__name__}", hint)
    return _neighbours(layers)


def dense_kind(module: nn.Module) -> str | None:
    """ "linear", "conv1d" or "embedding" for a dense module that can be replaced, else None.

    Subclasses are not, as their forward may do more; Conv1D is transformers' and known by name, to keep this file free of it.
    """
    if type(module) is nn.Linear:
        return "linear"
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and module.weight.ndim == 2:
        return "conv1d"
    if type(module) is nn.Embedding or is_scaled_embedding(module):
        return "embedding"
    return None


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether rows are multiplied by `embed_scale`: the ...ScaledWordEmbedding classes of transformers do that and nothing else."""
    return isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding") and hasattr(module, "embed_scale")


def dense_shape(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a dense module; (rows, K) of an embedding."""
    first, second = module.weight.shape
    return (second, first) if dense_kind(module) == "conv1d" else (first, second)


def _plan_linear(name: str, module: nn.Module, options: PlanOptions) -> list[LayerPlan]:
    """The plan of one module: nothing, or one layer."""
    kind = dense_kind(module)
    if kind not in ("linear", "conv1d") or 0 in module.weight.shape:
        return []
    outputs, inputs = shape = dense_shape(module)
    rows, columns = tile_grid(*shape)
    packed = rows * columns * tile_bytes(options.bits_per_pair) + 2 * (outputs + inputs)
    if packed >= 2 * outputs * inputs or inputs > MAX_IN_FEATURES:
        return []
    # The input size is part of the key: names alone may bring together what does not read the same input (cross-attention).
    return [LayerPlan(name, kind, shape, f"{group_key(name)}/{inputs}", options.code, options.bits_per_pair)]


def _plan_head(model: nn.Module, options: PlanOptions, kept: list[str]) -> LayerPlan | None:
    """The plan of the output head, under the name of the module that will own the matrix."""
    owner, *others = tied_to_head(model) or [""]
    name = output_head(model)
    if name is None or options.head == "keep" or _is_kept(name, kept) or dense_kind(model.get_submodule(name)) != "linear":
        return None
    shape = dense_shape(model.get_submodule(name))
    if options.head == "trellis":
        if others and {owner, *others} != {owner, name}:
            hint = "use head=int8 or head=keep for this model"
            raise UnsupportedModelError("a head that is quantized apart may be tied to one embedding only", [owner, *others], hint)
        source = owner if owner != name else None
        return LayerPlan(name, "linear", shape, name, "trellis", _HEAD_TRELLIS_BITS_PER_PAIR, "head", source=source)
    for tied in (owner, *others):
        if dense_kind(model.get_submodule(tied)) not in ("linear", "embedding"):
            got = f"{type(model.get_submodule(tied)).__name__} {tied}"
            hint = "use head=keep for this model"
            raise UnsupportedModelError("modules tied to the head must be plain embeddings or linear layers", got, hint)
    kind = dense_kind(model.get_submodule(owner))
    return LayerPlan(owner, kind, shape, owner, "int8", _INT8_BITS_PER_PAIR, "head", tuple(others))


def output_head(model: nn.Module) -> str | None:
    """Name of the output embedding, or None."""
    getter = getattr(model, "get_output_embeddings", None)
    module = getter() if getter is not None else None
    return next((name for name, found in model.named_modules() if found is module), None)


def tied_to_head(model: nn.Module) -> list[str]:
    """The modules that use the head's matrix: first the one under whose name it is stored, then the others in the order of the model."""
    head = output_head(model)
    if head is None:
        return []
    weight = model.get_submodule(head).weight
    declared: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    key = declared.get(f"{head}.weight", f"{head}.weight")
    keys = {key} | {target for target, source in declared.items() if source == key}
    names = [name for name, module in model.named_modules() if f"{name}.weight" in keys or getattr(module, "weight", None) is weight]
    embeddings = [name for name in names if isinstance(model.get_submodule(name), nn.Embedding)]
    owner = key.removesuffix(".weight")
    if owner == head and embeddings:
        owner = embeddings[0]
    return [owner, *(name for name in names if name != owner)]


def _is_kept(name: str, kept: list[str]) -> bool:
    """Whether `kept` names a module, something it is part of, or a run of neighbours in its dotted path."""
    return any(f".{pattern}." in f".{name}." for pattern in kept)


def _refuse_fused_experts(name: str, module: nn.Module) -> None:
    """Experts in one three-dimensional parameter hold most of a mixture: leaving them out silently would be a lie."""
    for part, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3 and "experts" in name.split("."):
            hint = "this version quantizes mixtures only where every expert is a module of its own"
            raise UnsupportedModelError("experts must be linear layers", f"{list(parameter.shape)} in {name}.{part}", hint)


def _neighbours(layers: list[LayerPlan]) -> list[LayerPlan]:
    """The same layers, each group brought together at the place of its first member."""
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return [layer for members in groups.values() for layer in members]
