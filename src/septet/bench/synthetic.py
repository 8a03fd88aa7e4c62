"""Septet directories with random weights: models of any size, made in seconds, to time and to test memory with.

Every byte string is a valid packed matrix and products take the same time for any, so nothing has to be quantized. Scales keep the
activations in the usual range. The text of such a model is noise.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from septet.checkpoint.layout import INDEX_NAME, OutputTensor, index_of, plan_shards
from septet.checkpoint.options import FORMAT_VERSION
from septet.errors import CheckpointError, OptionError
from septet.quantize.stored import stored_arrays

__all__ = ["HEADS", "SHAPES", "Shape", "write_synthetic"]

HEADS = ("int8", "trellis")
_NAMES = {np.dtype(np.uint8): "U8", np.dtype(np.int8): "I8", np.dtype(np.float16): "F16"}
_ROTATION = 256
_MAX_SHARD_BYTES = 1 << 32
_NOISE_BYTES = 1 << 24


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of the Llama family; `tied`: the embedding is the output head too."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @property
    def linear_weights(self) -> int:
        """Weights of the linear layers of all blocks, without embedding and head."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)


#: The sizes of Llama 3.2 1B and 3B, and of Llama 3.1 8B.
SHAPES = {
    "1b": Shape(2048, 16, 8192, 32, 8, 64, 128_256, True),
    "3b": Shape(3072, 28, 8192, 24, 8, 128, 128_256, True),
    "8b": Shape(4096, 32, 14_336, 32, 8, 128, 128_256, False),
}


def write_synthetic(shape: Shape, out: Path, head: str = "int8", seed: int = 0) -> None:
    """Write a septet directory of code trellis, 3.5 bits.

    Args:
        shape: sizes of the model.
        out: must not exist.
        head: "int8", or "trellis" with 8 bits per pair; the embedding stays int8.
        seed: of the random bytes.

    Raises:
        OptionError: `head` is unknown.
        CheckpointError: `out` exists.
    """
    if head not in HEADS:
        raise OptionError(f"head must be one of {', '.join(HEADS)}", head, "choose one of them")
    if out.exists():
        raise CheckpointError(f"{out} must not exist", "something there", "choose another place, or delete it")
    layers = dict(_layers(shape, head))
    tensors = []
    for name, entry in layers.items():
        for part, (dtype, sizes) in stored_arrays(entry, name).items():
            tensors.append(OutputTensor(f"{name}.{part}", _NAMES[dtype], sizes))
    norms = ["model.norm"] + [f"model.layers.{i}.{norm}_layernorm" for i in range(shape.layers) for norm in ("input", "post_attention")]
    tensors += [OutputTensor(f"{name}.weight", "F16", (shape.hidden,)) for name in norms]
    out.mkdir(parents=True)
    shards = plan_shards(tensors, _MAX_SHARD_BYTES)
    checksums = {}
    noise = np.random.default_rng(seed).bytes(_NOISE_BYTES)
    by_key = {tensor.key: tensor for tensor in tensors}
    for shard in shards:
        with open(out / shard.name, "wb") as file:
            file.write(shard.head)
            for key in sorted(shard.offsets, key=shard.offsets.__getitem__):
                checksum = 0
                for data in _values(by_key[key], layers, noise):
                    checksum = zlib.crc32(data, checksum)
                    file.write(data)
                checksums[key] = f"{checksum:08x}"
    if len(shards) > 1:
        (out / INDEX_NAME).write_text(json.dumps(index_of(shards)))
    (out / "config.json").write_text(json.dumps(_config(shape, head, layers, checksums), indent=1))


def _layers(shape: Shape, head: str) -> Iterator[tuple[str, dict]]:
    """Module name -> entry of the quantization_config."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tied = ["lm_head"] if shape.tied and head == "int8" else []
    yield "model.embed_tokens", _entry("int8", 16, shape.hidden, shape.vocabulary) | {"role": "head", "tied": tied}
    if head == "trellis":
        yield "lm_head", _entry("trellis", 8, shape.hidden, shape.vocabulary) | {"role": "head"}
    elif not shape.tied:
        yield "lm_head", _entry("int8", 16, shape.hidden, shape.vocabulary) | {"role": "head"}
    sizes = {
        "self_attn.q_proj": (shape.hidden, queries), "self_attn.k_proj": (shape.hidden, keys), "self_attn.v_proj": (shape.hidden, keys),
        "self_attn.o_proj": (queries, shape.hidden), "mlp.gate_proj": (shape.hidden, shape.intermediate),
        "mlp.up_proj": (shape.hidden, shape.intermediate), "mlp.down_proj": (shape.intermediate, shape.hidden),
    }  # fmt: skip
    for layer in range(shape.layers):
        for module, (inputs, outputs) in sizes.items():
            yield f"model.layers.{layer}.{module}", _entry("trellis", 7, inputs, outputs) | {"role": "linear"}


def _entry(code: str, bits: int, inputs: int, outputs: int) -> dict:
    output_block = math.gcd(outputs, _ROTATION) if code == "trellis" else 1
    blocks = {"input_block": math.gcd(inputs, _ROTATION), "output_block": output_block}
    return {"code": code, "bits_per_pair": bits, "in_features": inputs, "out_features": outputs} | blocks


def _values(tensor: OutputTensor, layers: dict[str, dict], noise: bytes) -> Iterator[bytes]:
    """The content of a tensor: random codes, random signs, scales for outputs of unit variance; norms are 1."""
    if tensor.dtype != "F16":
        for start in range(0, tensor.size_bytes, len(noise)):
            yield noise[: tensor.size_bytes - start]
        return
    module, _, part = tensor.key.rpartition(".")
    if part == "weight_scale":
        level = 74 if layers[module]["code"] == "int8" else 47  # root mean square of random levels
        values = np.full(tensor.shape, 1 / (level * math.sqrt(layers[module]["in_features"])))
    elif part == "weight_input_scale":
        values = 2.0 * (np.frombuffer(noise, np.uint8, tensor.shape[0]) % 2) - 1
    else:
        values = np.ones(tensor.shape)
    yield values.astype("<f2").tobytes()


def _config(shape: Shape, head: str, layers: dict[str, dict], checksums: dict[str, str]) -> dict:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": shape.tied,
        "quantization_config": {
            "quant_method": "septet", "format_version": FORMAT_VERSION, "code": "trellis", "bits_per_weight": 3.5, "head": head,
            "activations": "int8", "activation_scale": "block", "rotation_block": _ROTATION, "seed": 0, "layers": layers,
            "crc32": checksums,
        },
    }  # fmt: skip
