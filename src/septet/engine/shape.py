"""What the engine needs to know of a model, from its config.json; everything it does not know is refused by name.

The rotary frequencies are computed here, in float64 and rounded once, so that the native code only multiplies by a position.
Reference: Su et al., RoFormer, 2021, arXiv:2104.09864; the llama3 rule: Llama team, The Llama 3 Herd of Models, 2024, arXiv:2407.21783.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from septet.errors import UnsupportedModelError

__all__ = ["FAMILIES", "ModelShape", "read_shape"]

#: model_type -> what it adds to a plain Llama.
FAMILIES = {"llama": (), "mistral": (), "qwen2": ("qkv_bias",), "qwen3": ("head_norm",)}
_HINT = "run this model through transformers"
_MAX_SIZE, _MAX_INPUTS, _MAX_HEAD_DIM = 1 << 28, 131_071, 256
_MAX_CONTEXT = 1 << 24
_MAX_NUMBER = 1e30
_WINDOW, _FIRST_WINDOWED = 4096, 28


@dataclass(frozen=True, eq=False)
class ModelShape:
    """Sizes and constants of a decoder.

    Args:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: sizes, at least 1.
        positions: most tokens of a text.
        epsilon: of the norms.
        tied: the embedding is the output head too.
        head_norm: queries and keys are normalized per head.
        frequencies: float32 [head_dim / 2], angle per position.
        windows: per layer, how many positions it sees; 0 is all.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    epsilon: float
    tied: bool
    head_norm: bool
    frequencies: np.ndarray
    windows: tuple[int, ...]


def read_shape(config: Mapping[str, object]) -> ModelShape:
    """Understand a config.json.

    Args:
        config: its content; not trusted.

    Raises:
        UnsupportedModelError: another family, or a feature or size that the engine does not know.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise _unsupported(f"model_type must be one of {', '.join(FAMILIES)}", family)
    for key, known in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if config.get(key, known) != known:
            raise _unsupported(f"{key} must be {known}", config[key])
    heads, hidden = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    head_dim = _size(config, "head_dim", hidden // heads)
    layers = _size(config, "num_hidden_layers")
    positions = min(_size(config, "max_position_embeddings"), _MAX_CONTEXT)
    epsilon = config.get("rms_norm_eps", 1e-6)
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise _unsupported("rms_norm_eps must be between 0 and 1", epsilon)
    if head_dim % 2 or head_dim > _MAX_HEAD_DIM or layers > 1 << 12:
        raise _unsupported(f"head_dim must be even and at most {_MAX_HEAD_DIM}, with at most 4096 layers", f"{head_dim} and {layers}")
    intermediate = _size(config, "intermediate_size")
    if max(hidden, intermediate, heads * head_dim) > _MAX_INPUTS:
        raise _unsupported(f"layers must have at most {_MAX_INPUTS} inputs", f"{hidden}, {intermediate} and {heads} x {head_dim}")
    return ModelShape(
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=_size(config, "num_key_value_heads", heads),
        head_dim=head_dim,
        vocabulary=_size(config, "vocab_size"),
        positions=positions,
        epsilon=epsilon,
        tied=config.get("tie_word_embeddings", False) is True,
        head_norm="head_norm" in FAMILIES[family],
        frequencies=_frequencies(config, head_dim),
        windows=_windows(config, family, layers),
    )


def _unsupported(requirement: str, got: object) -> UnsupportedModelError:
    return UnsupportedModelError(f"for the native engine, {requirement}", got, _HINT)


def _size(config: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if type(value) is not int or not 1 <= value <= _MAX_SIZE:
        raise _unsupported(f"{key} must be a whole number in 1..{_MAX_SIZE}", repr(value))
    return value


def _number(table: Mapping[str, object], key: str) -> float:
    value = table.get(key)
    if type(value) not in (int, float) or not 0 < value <= _MAX_NUMBER:
        raise _unsupported(f"{key} of the rotary positions must be a positive number", repr(value))
    return float(value)


def _frequencies(config: Mapping[str, object], head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]; newer configs say rope_parameters, older ones rope_theta and rope_scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise _unsupported("rope_parameters must be an object", rope)
    rope = {"rope_theta": config.get("rope_theta", 10000.0)} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    plain = _number(rope, "rope_theta") ** (-np.arange(0, head_dim, 2) / head_dim)
    if kind == "default":
        scaled = plain
    elif kind == "linear":
        scaled = plain / _number(rope, "factor")
    elif kind == "llama3":
        scaled = _scale_llama3(plain, rope)
    else:
        raise _unsupported("rope_type must be default, linear or llama3", kind)
    return scaled.astype(np.float32)


def _scale_llama3(plain: np.ndarray, rope: Mapping[str, object]) -> np.ndarray:
    """Long waves are slowed down by `factor`, short ones kept, those between interpolated."""
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = _number(rope, "original_max_position_embeddings") * plain / (2 * math.pi)
    if not low < high:
        raise _unsupported("low_freq_factor must be below high_freq_factor", f"{low} and {high}")
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / factor


def _windows(config: Mapping[str, object], family: str, layers: int) -> tuple[int, ...]:
    """Per layer: positions seen, 0 for all; what a config leaves out is what transformers assumes for the family."""
    used = family == "mistral" or (family in ("qwen2", "qwen3") and config.get("use_sliding_window") is True)
    if not used or config.get("sliding_window", _WINDOW) is None:
        return (0,) * layers
    window = _size(config, "sliding_window", _WINDOW)
    if family == "mistral":
        return (window,) * layers
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", _FIRST_WINDOWED)
        if type(first) is not int:
            raise _unsupported("max_window_layers must be a whole number", repr(first))
        return tuple(window if layer >= first else 0 for layer in range(layers))
    known = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not all(isinstance(kind, str) and kind in known for kind in types):
        raise _unsupported(f"layer_types must name {layers} kinds of full or sliding attention", str(types)[:80])
    return tuple(known[kind] for kind in types)
