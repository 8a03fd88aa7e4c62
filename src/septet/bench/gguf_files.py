"""GGUF files with random weights, so that llama.cpp can be timed on the sizes of any model that septet runs.

Blocks are random bytes with small scales: llama.cpp's speed does not depend on them. All files have the architecture "llama" and no
vocabulary texts. `pure` files have one type everywhere; else the head and, for Q4_K, some projections have more bits, as llama.cpp's
own `quantize` chooses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from septet.checkpoint.source import read_config
from septet.engine.shape import ModelShape, read_shape
from septet.errors import OptionError, UnsupportedModelError

__all__ = ["TYPES", "files_like", "write_random_gguf"]

#: Type as llama.cpp calls it -> bytes of a block, where its float16 scales lie, file type number.
_BLOCKS = {
    "Q4_0": (18, (0,), 2),
    "Q4_K": (144, (0, 2), 14),
    "Q6_K": (210, (208,), 18),
    "IQ3_S": (110, (0,), 26),
    "IQ4_XS": (136, (0,), 30),
    "Q3_K": (110, (108,), 11),
    "Q8_0": (34, (0,), 7),
}
TYPES = tuple(_BLOCKS)
_SCALE = 0.0005
_NOISE_BYTES = 1 << 24


def files_like(directory: Path, folder: Path, kinds: Sequence[str]) -> list[Path]:
    """GGUF files of the sizes of a septet model: like with like, `pure` when its head is of the trellis code too.

    Args:
        directory: a septet directory.
        folder: where the files are, or come to be; those there are used again.
        kinds: of TYPES.

    Returns:
        A file for each of them.

    Raises:
        CheckpointError, UnsupportedModelError, OptionError: as `read_config`, `read_shape` and `write_random_gguf`.
    """
    config = read_config(directory)
    shape = read_shape(config)
    quantization = config.get("quantization_config")
    pure = isinstance(quantization, dict) and quantization.get("head") == "trellis"
    paths = []
    for kind in kinds:
        path = folder / f"{directory.name}-{kind}{'' if pure else '-mix'}.gguf"
        if not path.exists():
            unfinished = path.with_suffix(".partial")
            write_random_gguf(shape, unfinished, kind, pure)
            unfinished.rename(path)
        paths.append(path)
    return paths


def write_random_gguf(shape: ModelShape, path: Path, kind: str, pure: bool, seed: int = 0) -> None:
    """Write a GGUF file.

    Args:
        shape: sizes, frequencies and epsilon of the model.
        path: is replaced.
        kind: one of TYPES.
        pure: every matrix of that type; else the head is Q6_K, and for Q4_K half of the value and down projections too ("Q4_K_M").
        seed: of the random bytes.

    Raises:
        OptionError: `kind` is unknown, or its blocks do not divide the rows.
        UnsupportedModelError: the package gguf is missing.
    """
    if kind not in _BLOCKS:
        raise OptionError(f"a type must be one of {', '.join(TYPES)}", kind, "choose one of them")
    try:
        import gguf
    except ImportError as error:
        raise UnsupportedModelError("making GGUF files needs the package gguf", error, "pip install 'septet[gguf]'") from error
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, shape, _BLOCKS[kind][2])
    tensors = list(_tensors(shape, kind, pure))
    noise = np.frombuffer(np.random.default_rng(seed).bytes(_NOISE_BYTES), np.uint8)
    for name, sizes, type_name in tensors:
        if type_name is None:
            writer.add_tensor_info(name, sizes, np.dtype(np.float32), 4 * sizes[0])
            continue
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
        if sizes[1] % block:
            raise OptionError(f"rows must be multiples of {block} for {type_name}", f"{name}: {sizes[1]}", "choose another type")
        bytes_per_row = sizes[1] // block * _BLOCKS[type_name][0]
        raw = gguf.GGMLQuantizationType[type_name]
        writer.add_tensor_info(name, (sizes[0], bytes_per_row), np.dtype(np.uint8), sizes[0] * bytes_per_row, raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, sizes, type_name in tensors:
        if type_name is None:
            writer.write_tensor_data(np.ones(sizes, np.float32))
        else:
            block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]][0]
            writer.write_tensor_data(_random_blocks(noise, type_name, sizes[0] * sizes[1] // block))
    writer.close()


def _describe(writer: object, shape: ModelShape, file_type: int) -> None:
    writer.add_block_count(shape.layers)
    writer.add_context_length(min(shape.positions, 8192))
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.epsilon)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("no_vocab")


def _tensors(shape: ModelShape, kind: str, pure: bool) -> Iterator[tuple[str, tuple[int, ...], str | None]]:
    """Name, [outputs, inputs], type; None: a norm in float32."""
    head = kind if pure else "Q6_K"
    if shape.hidden % 256:
        head = kind if pure else "Q8_0"
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "token_embd.weight", (shape.vocabulary, shape.hidden), head if shape.tied else kind
    yield "output_norm.weight", (shape.hidden,), None
    if not shape.tied:
        yield "output.weight", (shape.vocabulary, shape.hidden), head
    for i in range(shape.layers):
        more = "Q6_K" if kind == "Q4_K" and not pure and _gets_more_bits(i, shape.layers) else kind
        yield f"blk.{i}.attn_norm.weight", (shape.hidden,), None
        yield f"blk.{i}.ffn_norm.weight", (shape.hidden,), None
        yield f"blk.{i}.attn_q.weight", (queries, shape.hidden), kind
        yield f"blk.{i}.attn_k.weight", (keys, shape.hidden), kind
        yield f"blk.{i}.attn_v.weight", (keys, shape.hidden), more
        yield f"blk.{i}.attn_output.weight", (shape.hidden, queries), kind
        yield f"blk.{i}.ffn_gate.weight", (shape.intermediate, shape.hidden), kind
        yield f"blk.{i}.ffn_up.weight", (shape.intermediate, shape.hidden), kind
        yield f"blk.{i}.ffn_down.weight", (shape.hidden, shape.intermediate), more


def _gets_more_bits(layer: int, layers: int) -> bool:
    """Where Q4_K_M spends its extra bits: the first and last eighth, and every third layer between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _random_blocks(noise: np.ndarray, kind: str, blocks: int) -> np.ndarray:
    """uint8 [blocks * size]: random bytes, scales small and finite."""
    size, scales, _ = _BLOCKS[kind]
    data = np.resize(noise, (blocks, size))
    for at in scales:
        data[:, at : at + 2] = np.frombuffer(np.float16(_SCALE).tobytes(), np.uint8)
    return data.reshape(-1)
