"""Small models for checkpoint tests, written with nothing but the standard library and NumPy, a plan for them, and fixtures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from septet.checkpoint import QuantizeOptions
from septet.checkpoint.directory import ModelDirectory
from septet.checkpoint.stream import Hooks, quantize_checkpoint
from septet.model import LayerPlan

HIDDEN, WIDE, VOCABULARY, LAYERS = 64, 96, 50, 2
COMPANIONS = {
    "tokenizer.json": b'{"model": {}}\n',
    "chat_template.jinja": b"{{ messages }}\r\n",
    "generation_config.json": b"{}",
    "LICENSE": "free as in \u00e9tude".encode(),
}


def bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> the upper half of its bits, uint16."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file; uint16 arrays are stored as BF16."""
    header, position = {}, 0
    for key, array in tensors.items():
        dtype = {"uint16": "BF16", "float32": "F32", "float16": "F16", "int64": "I64", "uint8": "F8_E4M3"}[array.dtype.name]
        header[key] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in tensors.values()))


def tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """The weights of a model in the shape of a LLaMA with a tied embedding."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        for name, shape in {"q": (HIDDEN, HIDDEN), "k": (32, HIDDEN), "v": (32, HIDDEN)}.items():
            shapes[f"model.layers.{layer}.self_attn.{name}_proj"] = shape
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (HIDDEN, WIDE)
    made = {f"{name}.weight": bfloat16(rng.standard_normal(shape) * 0.02) for name, shape in shapes.items()}
    made["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    made["model.layers.0.self_attn.q_proj.bias"] = bfloat16(rng.standard_normal(HIDDEN))
    made["model.steps"] = np.arange(3)
    return made


def write_model(path: Path, shards: int = 1, seed: int = 0) -> Path:
    """A model directory with one or more shards."""
    path.mkdir(parents=True)
    everything = tensors(seed)
    keys = list(everything)
    if shards == 1:
        write_shard(path / "model.safetensors", everything)
    else:
        parts = {f"model-{i + 1:05}-of-{shards:05}.safetensors": keys[i::shards] for i in range(shards)}
        for name, part in parts.items():
            write_shard(path / name, {key: everything[key] for key in part})
        weight_map = {key: name for name, part in parts.items() for key in part}
        (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": True}))
    for name, content in COMPANIONS.items():
        (path / name).write_bytes(content)
    return path


def plan(source: ModelDirectory, options: QuantizeOptions) -> list[LayerPlan]:
    """The layers of such a model."""
    layers = []
    if options.head == "int8":
        layers.append(LayerPlan("model.embed_tokens", "embedding", (VOCABULARY, HIDDEN), "head", "int8", 16, "head", ("lm_head",)))
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (32, HIDDEN), "self_attn.v_proj": (32, HIDDEN)}
        for name, shape in (shapes | {"mlp.down_proj": (HIDDEN, WIDE)}).items():
            group = f"{prefix}.{name.split('.')[0]}"
            layers.append(LayerPlan(f"{prefix}.{name}", "linear", shape, group, options.code, options.bits_per_pair))
    return layers


def quantize(source: Path, out: Path, resume: bool = False, threads: int = 1, **options: object) -> bool:
    """Quantize with the plan above."""
    return quantize_checkpoint(source, out, QuantizeOptions(**options), Hooks(plan), resume, threads)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a directory."""
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A model to quantize."""
    return write_model(tmp_path / "source")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the checkpoint shall appear."""
    return tmp_path / "out"


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an intact septet checkpoint of it."""
    path = tmp_path_factory.mktemp("intact")
    quantize(write_model(path / "source"), path / "out")
    return contents(path / "out")


@pytest.fixture
def made(intact: dict[str, bytes], tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    path = tmp_path / "made"
    path.mkdir()
    for name, content in intact.items():
        (path / name).write_bytes(content)
    return path
