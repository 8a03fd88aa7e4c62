"""Random models of the Llama family whose linear layers are packed trellis weights of random bytes, for the decode kernel of a GPU."""

from __future__ import annotations

import torch
import transformers

from septet.layer import SeptetLinear

_SIZES = {"vocab_size": 300, "num_hidden_layers": 3, "max_position_embeddings": 2048, "initializer_range": 0.2}


def _llama():
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 768, "head_dim": 64}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **sizes))


def _smollm():
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**_SIZES, **sizes))


def _mistral():
    sizes = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1088, "head_dim": 128}
    return transformers.MistralForCausalLM(transformers.MistralConfig(**_SIZES, **sizes, sliding_window=None))


def _qwen2():
    sizes = {"hidden_size": 448, "num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 1024}
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**_SIZES, **sizes))


def _qwen3():
    sizes = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1536, "head_dim": 128}
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**_SIZES, **sizes))


FAMILIES = {"llama": _llama, "smollm": _smollm, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3}


def _largest_block(features: int) -> int:
    return min(256, features & -features)


def packed_model(family: str, bits: int = 7) -> transformers.PreTrainedModel:
    """A model of a family, the same one every time, in float32 on the CPU, in eval mode.

    Args:
        family: a key of FAMILIES.
        bits: bits per pair.
    """
    torch.manual_seed(len(family))
    model = FAMILIES[family]().eval()
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            shared = {}
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, _packed(child, bits, shared))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm" in name or name.endswith("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _packed(dense: torch.nn.Linear, bits: int, shared: dict[int, torch.Tensor]) -> SeptetLinear:
    """A layer of random bytes of the same shape; layers of one parent with as many inputs share their input scales."""
    inputs, outputs = dense.in_features, dense.out_features
    entry = {"code": "trellis", "bits_per_pair": bits, "in_features": inputs, "out_features": outputs}
    entry |= {"input_block": _largest_block(inputs), "output_block": _largest_block(outputs)}
    layer = SeptetLinear(entry, bias=dense.bias)
    signs = torch.randint(0, 2, (inputs,)) * 2 - 1
    with torch.no_grad():
        layer.weight.random_(0, 256)
        layer.weight_scale.copy_(torch.rand(outputs) / (40 * inputs**0.5) + 1 / (60 * inputs**0.5))
        layer.weight_input_scale.copy_(shared.setdefault(inputs, signs * (torch.rand(inputs) + 0.5)))
    layer.activation_scale = "block"
    return layer
