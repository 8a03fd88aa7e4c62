"""What the decode kernel needs of a model of transformers: its layers and norms as tensors, and its sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from septet.errors import UnsupportedModelError
from septet.gpu.token import Block, Sizes, check_blocks
from septet.layer import SeptetLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "read_blocks", "read_rotary", "read_sizes"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
#: Kinds of rotary positions whose angles do not depend on the length of a text.
_ROTARY = ("default", "linear", "llama3", "yarn")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
#: Which of these seven read the same inputs.
_SHARING = slice(0, 3), slice(4, 6)
_HINT = "run this model through transformers"


def _check(holds: bool, requirement: str, got: object) -> None:
    if not holds:
        raise UnsupportedModelError(f"for decoding on the GPU, {requirement}", got, _HINT)


def read_sizes(model: PreTrainedModel, length: int) -> Sizes:
    """Sizes of a model.

    Args:
        model: on a GPU.
        length: most tokens of a text.

    Raises:
        UnsupportedModelError: another family, or a feature that the kernel does not know; or the model is spread over several devices.
    """
    config = model.config
    places = {parameter.device for parameter in model.parameters()}
    _check(len(places) == 1, "all of a model must be on one GPU", ", ".join(sorted(map(str, places))))
    family = getattr(config, "model_type", None)
    _check(family in FAMILIES, f"model_type must be one of {', '.join(FAMILIES)}", family)
    _check(config.hidden_act == "silu", "hidden_act must be silu", config.hidden_act)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True) is not False
    # a config that lists the kinds of its layers says more than one that has a window
    _check(kinds == {"full_attention"}, "every layer must see the whole text", ", ".join(sorted(kinds)))
    _check(not windowed or hasattr(config, "layer_types"), "every layer must see the whole text", "a sliding window")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check(kind in _ROTARY, f"rope_type must be one of {', '.join(_ROTARY)}", kind)
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    _check_dtypes([norm.weight], model.dtype)
    heads = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    return Sizes(config.hidden_size, *heads, length, norm.variance_epsilon, attention.scaling, model.dtype)


def read_blocks(model: PreTrainedModel, sizes: Sizes) -> list[Block]:
    """All layers of a model, as `septet.gpu.token.check_blocks` accepts them.

    Args:
        model: on a GPU, a family of `read_sizes`.
        sizes: of it.

    Raises:
        UnsupportedModelError: a layer is not packed, computes with float activations, or is of a kind that the kernel does not know; or
            parameters have another dtype than the model.
    """
    blocks = [_read_block(layer, sizes.dtype) for layer in model.model.layers]
    check_blocks(blocks, sizes)
    return blocks


def _read_block(layer: torch.nn.Module, dtype: torch.dtype) -> Block:
    modules = [getattr(parent, name) for parent, names in zip((layer.self_attn, layer.mlp), _LINEAR) for name in names]
    for module in modules:
        _check(isinstance(module, SeptetLinear), "every linear layer must be packed", type(module).__name__)
        _check(module.code == "trellis", "every linear layer must be of code trellis", module.code)
        _check(module.activations == "int8", "activations must be int8", module.activations)
    for first, *others in (modules[part] for part in _SHARING):
        same = all(one.input_block == first.input_block and torch.equal(one.weight_input_scale, first.weight_input_scale) for one in others)
        _check(same, "layers with the same inputs must share their input scales", "others")
    norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
    head_norms = tuple(getattr(getattr(layer.self_attn, name, None), "weight", None) for name in ("q_norm", "k_norm"))
    biases = tuple(module.bias for module in modules)
    _check_dtypes([*norms, *head_norms, *biases], dtype)
    prepared = [module.on_gpu() for module in modules]
    return Block(tuple(prepared[:3]), prepared[3], tuple(prepared[4:6]), prepared[6], biases, norms, head_norms)


def _check_dtypes(parameters: list[torch.Tensor | None], dtype: torch.dtype) -> None:
    """Raise unless the kernel, which knows addresses only, reads parameters as what they are."""
    for parameter in parameters:
        if parameter is not None:
            _check(parameter.dtype == dtype, "norms and biases must have the dtype of the model", f"{parameter.dtype} and {dtype}")


def read_rotary(model: PreTrainedModel, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position: float32 [length, head / 2].

    Raises:
        UnsupportedModelError: positions turn a part of a head only.
    """
    positions, head = torch.arange(length, device=model.device)[None], model.model.layers[0].self_attn.head_dim
    tables = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32, device=model.device), positions)
    _check(tables[0].shape[-1] == head, f"positions must turn all {head} numbers of a head", tables[0].shape[-1])
    return tuple(table[0, :, : table.shape[-1] // 2] for table in tables)
