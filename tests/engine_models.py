"""Small random models of every family the engine knows, quantized, and the same weights dense in transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from septet import model
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.stream import Hooks, quantize_checkpoint
from septet.loading import load_model, plan_checkpoint

VOCABULARY, POSITIONS = 203, 640
_SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": POSITIONS, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4,
}  # fmt: skip
WINDOW_TYPES = ["full_attention", "sliding_attention"]
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

#: name -> (transformers' prefix, options beyond _SIZES)
FAMILIES = {
    "llama": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-odd": (
        "Llama",
        {"hidden_size": 60, "intermediate_size": 99, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 18},
    ),
    "llama-bias": ("Llama", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 40, "head_dim": 32}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 33, "layer_types": WINDOW_TYPES},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True}),
}
#: Enough outputs for a thread to finish those of a single token where it has made them, and some that fill no tile.
#: For comparisons of bits: bounds of float logits are those of the small models above.
WIDE = {
    "llama-wide": (
        "Llama",
        {"hidden_size": 512, "intermediate_size": 1000, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128},
    ),
}


def save(family: str, path: Path, layers: int = 2) -> Path:
    """Save a dense model of the family, the same weights every time; biases and norms are random too."""
    prefix, options = (FAMILIES | WIDE)[family]
    config = getattr(transformers, f"{prefix}Config")(**{**_SIZES, **options, "num_hidden_layers": layers})
    torch.manual_seed(0)
    made = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            # Weights large enough for attention and logits to be far from uniform.
            parameter.copy_(1 + 0.1 * torch.randn_like(parameter) if parameter.ndim == 1 else 0.1 * torch.randn_like(parameter))
    made.save_pretrained(path)
    return path


def quantized(family: str, folder: Path, layers: int = 2, **options: object) -> Path:
    """A septet directory of the family."""
    return pack(save(family, folder / "dense", layers), folder / "packed", **options)


def pack(source: Path, out: Path, **options: object) -> Path:
    """Quantize a directory."""
    quantize_checkpoint(source, out, QuantizeOptions(**options), Hooks(plan_checkpoint), False, 1)
    return out


def dense(directory: Path):
    """The dequantized weights of a septet directory in a float32 model of transformers."""
    transformers.utils.logging.disable_progress_bar()
    loaded = load_model(directory, torch.float32, "float")
    model.restore_modules(loaded, torch.float32)
    return loaded


def logits(loaded, tokens: list[int]):
    """Logits of transformers as NumPy float32 [tokens, vocabulary]."""
    with torch.no_grad():
        return loaded(input_ids=torch.tensor([tokens])).logits[0].float().numpy()
