"""Golden vectors: bytes, inputs and results that every backend must reproduce bit for bit (SPEC.md section 9)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from septet.kernels import LayerWeights

GOLDEN = Path(__file__).parent / "golden" / "v0"
FILES = sorted(GOLDEN.glob("*.json"))


def array_of(described: dict) -> np.ndarray:
    """The array that a golden file's text stands for."""
    flat = np.frombuffer(bytes.fromhex(described["hex"]), np.dtype(described["dtype"]).newbyteorder("<"))
    return flat.astype(described["dtype"]).reshape(described["shape"])


def layer_of(golden: dict) -> LayerWeights:
    tensors = {name: array_of(text) for name, text in golden["tensors"].items()}
    same = ("code", "bits_per_pair", "in_features", "out_features", "input_block", "output_block", "group_size")
    return LayerWeights(
        **{key: golden[key] for key in same},
        packed=tensors["weight"],
        scale=tensors["weight_scale"],
        offset=tensors.get("weight_offset"),
        input_scale=tensors.get("weight_input_scale"),
        activation_segment=golden["activation_scale"],
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_backend_reproduces_golden_bits(path, backend):
    golden = json.loads(path.read_text())
    layer = layer_of(golden)
    if "levels" in golden:
        levels = backend.trellis_levels(layer.packed, layer.bits_per_pair)
        np.testing.assert_array_equal(levels, array_of(golden["levels"]))
    if "fields" in golden:
        np.testing.assert_array_equal(backend.split_fields(layer.packed), array_of(golden["fields"]))
    linear = getattr(backend, f"linear_{layer.code}")
    result = linear(array_of(golden["x"]), backend.prepare(layer), "int8")
    assert result.tobytes() == array_of(golden["y_int8"]).tobytes()


def test_golden_files_are_what_the_tool_writes():
    spec = importlib.util.spec_from_file_location("make_golden", Path(__file__).parent.parent / "tools" / "make_golden.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    files = tool.golden_files()
    assert sorted(files) == [path.name for path in FILES]
    for path in FILES:
        assert path.read_text() == files[path.name], f"{path.name} changed; a format change needs a new version"
