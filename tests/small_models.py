"""Small random transformers models, saved dense; each kind of head, of linear layer and of fused group is there."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

_SIZES = {"vocab_size": 260, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "intermediate_size": 192}


def _llama(tied: bool):
    config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=tied)
    return transformers.LlamaForCausalLM(config)


def _gpt2():
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, **ends))


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES))


def _gemma3():
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**_SIZES, num_key_value_heads=2, head_dim=16))


def _t5():
    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 4, "d_kv": 16}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=260, feed_forward_proj="gated-gelu", **sizes))


FAMILIES = {
    "llama": lambda: _llama(True),
    "llama-untied": lambda: _llama(False),
    "gpt2": _gpt2,
    "bert": _bert,
    "gemma3": _gemma3,
    "t5": _t5,
}


def build(family: str, dtype: torch.dtype = torch.float32):
    """A model of the family, the same one every time, in eval mode; biases and norms are random too."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


def save(family: str, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model of the family; returns its directory."""
    build(family, dtype).save_pretrained(path)
    return path


def load(family: str, path: Path, **keywords):
    """Load a directory with the class of the family, quietly."""
    transformers.utils.logging.disable_progress_bar()
    return type(build(family)).from_pretrained(path, **keywords)


def logits(model) -> torch.Tensor:
    """The output of a model for two fixed sequences of twelve tokens."""
    ids = torch.arange(3, 27).reshape(2, 12)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits
