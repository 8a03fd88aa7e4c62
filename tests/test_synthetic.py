"""Models with random weights: the engine loads and runs them, llama.cpp's sizes are theirs, and loading stays within its memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from septet.bench.synthetic import SHAPES, Shape, write_synthetic
from septet.checkpoint.directory import open_directory
from septet.checkpoint.tensor_file import DTYPE_BYTES
from septet.engine import Engine
from septet.engine.shape import read_shape
from septet.errors import CheckpointError, OptionError

SMALL = Shape(256, 2, 512, 8, 2, 32, 384, True)
HEADS = ["int8", "trellis"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_engine_runs_it(head: str, tied: bool, tmp_path: Path) -> None:
    write_synthetic(replace(SMALL, tied=tied), tmp_path / "model", head)
    logits = Engine.load(tmp_path / "model").logits([1, 2, 3, 300])
    # Outputs of unit variance, so the logits are neither flat nor enormous.
    assert np.isfinite(logits).all() and 0.2 < logits.std() < 5


def test_sizes_are_those_that_were_asked_for(tmp_path: Path) -> None:
    write_synthetic(SMALL, tmp_path / "model")
    directory = open_directory(tmp_path / "model")
    packed = sum(directory.entry(key).size_bytes for key in directory.owners if key.endswith("proj.weight"))
    assert 8 * packed == 3.5 * SMALL.linear_weights
    assert DTYPE_BYTES[directory.entry("model.embed_tokens.weight").dtype] == 1
    assert [round(shape.linear_weights / 1e9, 2) for shape in SHAPES.values()] == [0.97, 2.82, 6.98]


def test_what_it_refuses(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="head must be one of"):
        write_synthetic(SMALL, tmp_path / "model", "keep")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="must not exist"):
        write_synthetic(SMALL, tmp_path / "there")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "IQ3_S"])
@pytest.mark.parametrize("pure", [True, False])
def test_files_for_llama_cpp_have_the_same_sizes(kind: str, pure: bool, tmp_path: Path) -> None:
    import gguf

    from septet.bench.gguf_files import files_like

    write_synthetic(SMALL, tmp_path / "model", "trellis" if pure else "int8")
    (path,) = files_like(tmp_path / "model", tmp_path, [kind])
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    matrices = [tensor for name, tensor in tensors.items() if name.startswith("blk") and "norm" not in name]
    assert sum(tensor.n_elements for tensor in matrices) == SMALL.linear_weights and len(matrices) == 7 * SMALL.layers
    head = gguf.GGMLQuantizationType[kind if pure else "Q6_K"]
    assert tensors["token_embd.weight"].tensor_type == head
    for tensor in (matrices[0], matrices[-1]):
        assert np.isfinite(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).all()
    before = path.stat().st_mtime_ns
    assert files_like(tmp_path / "model", tmp_path, [kind]) == [path] and path.stat().st_mtime_ns == before
    with pytest.raises(OptionError, match="a type must be one of"):
        files_like(tmp_path / "model", tmp_path, ["Q9_9"])


def test_loading_takes_little_more_memory_than_the_file(tmp_path: Path) -> None:
    """What a model of 80 MB adds to the resident set, and what threads use that wait: in a process of its own, after imports."""
    write_synthetic(Shape(1024, 8, 4096, 16, 4, 64, 20_000, True), tmp_path / "model")
    assert read_shape(json.loads((tmp_path / "model" / "config.json").read_text())).layers == 8
    command = [sys.executable, "-m", "septet.bench.worker", "native", str(tmp_path / "model"), "4"]
    found = subprocess.run(command, input="decode 4\nidle 0.5\nquit\n", capture_output=True, text=True, check=True)
    loading, _, idle = map(json.loads, found.stdout.splitlines())
    assert loading["file_mb"] > 60 and loading["load_rss_mb"] < 1.15 * loading["file_mb"]
    # Workers look out for work for 100 us and then sleep; what is left is the measurement itself.
    assert idle["cpu_seconds"] < 0.01
