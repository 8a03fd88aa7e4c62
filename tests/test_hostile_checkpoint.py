"""Checkpoints that are damaged, that lie, or that cannot be written: always an error of three parts, never a crash or a loss."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
from checkpoints import intact, made, out, source  # noqa: F401 (fixtures)
from septet import checkpoint
from septet.checkpoint.directory import open_directory
from septet.checkpoint.stream import Hooks, quantize_checkpoint
from septet.checkpoint.tensor_file import open_tensor_file
from septet.checkpoint.workspace import Workspace
from septet.errors import CheckpointError, CodeRangeError, OptionError, UnsupportedModelError

# ruff: noqa: F811 (fixtures are imported names)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# headers


def shard(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(**changes: object) -> dict:
    return {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} | changes}


LIES = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length beyond the file": shard(entry(), bytes(16), length=10_000),
    "length of 2^64 - 1": b"\xff" * 8 + b"{}",
    "length of 200 MB": (200_000_000).to_bytes(8, "little") + b"{}",
    "no JSON": shard(b"not json at all!"),
    "not UTF-8": shard(b'{"\xff": 1}'),
    "a list": shard([1, 2]),
    "deep nesting": shard(b"[" * 100_000),
    "repeated key": shard(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "entry is no object": shard({"a": 1}),
    "entry lacks its offsets": shard({"a": {"dtype": "F32", "shape": [2, 2]}}, bytes(16)),
    "unknown dtype": shard(entry(dtype="F3"), bytes(16)),
    "dtype is a list": shard(entry(dtype=["F32"]), bytes(16)),
    "negative size": shard(entry(shape=[-2, -2]), bytes(16)),
    "size is a boolean": shard(entry(shape=[True, 4]), bytes(16)),
    "size is a float": shard(entry(shape=[2.0, 2]), bytes(16)),
    "product overflows": shard(entry(shape=[1 << 61, 1 << 61]), bytes(16)),
    "shape and offsets disagree": shard(entry(shape=[2, 3]), bytes(16)),
    "offsets reversed": shard(entry(data_offsets=[16, 0]), bytes(16)),
    "three offsets": shard(entry(data_offsets=[0, 8, 16]), bytes(16)),
    "hole before the first": shard(entry(data_offsets=[4, 20]), bytes(20)),
    "overlap": shard(entry() | {"b": entry()["a"]}, bytes(16)),
    "truncated data": shard(entry(), bytes(15)),
    "trailing data": shard(entry(), bytes(17)),
    "metadata is a list": shard(entry() | {"__metadata__": []}, bytes(16)),
}


@pytest.mark.parametrize("content", LIES.values(), ids=LIES)
def test_a_lying_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"must .*, got .*; .*fetch it again"):
        open_tensor_file(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = shard(entry(), bytes(16))
    path = tmp_path / "short.safetensors"
    path.write_bytes(whole)
    assert open_tensor_file(path).read("a").tobytes() == bytes(16)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_tensor_file(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 70), st.integers(0, 255))
def test_a_changed_header_byte_is_refused_or_harmless(tmp_path: Path, position: int, value: int) -> None:
    content = bytearray(shard(entry(), bytes(16)))
    content[position % len(content)] = value
    path = tmp_path / "changed.safetensors"
    path.write_bytes(content)
    try:
        file = open_tensor_file(path)
    except CheckpointError:
        return
    assert all(len(file.read(key)) == tensor.size_bytes for key, tensor in file.entries.items())


# sources


def test_pickle_is_refused_with_a_hint(source: Path, out: Path) -> None:
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin .*; pickle can run code"):
        checkpoints.quantize(source, out)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b.safetensors", "a\0.safetensors", "", 7])
def test_an_index_cannot_leave_the_directory(name: object, tmp_path: Path) -> None:
    source = checkpoints.write_model(tmp_path / "source", shards=2)
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match="plain .safetensors file name"):
        open_directory(source)


def test_an_index_that_contradicts_the_shards(tmp_path: Path) -> None:
    source = checkpoints.write_model(tmp_path / "source", shards=2)
    first = "model-00001-of-00002.safetensors"
    edit_json(source / "model.safetensors.index.json", lambda index: index["weight_map"].update({"model.extra": first}))
    with pytest.raises(CheckpointError, match=f"{first} must hold model.extra"):
        open_directory(source)
    (source / first).unlink()
    with pytest.raises(CheckpointError, match=f"{first} must be readable"):
        open_directory(source)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_damaged_config(content: bytes, source: Path, out: Path) -> None:
    (source / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json must"):
        checkpoints.quantize(source, out)
    assert not out.exists()


def test_weights_that_contradict_the_config(source: Path, out: Path) -> None:
    everything = checkpoints.tensors()
    key = "model.layers.0.mlp.down_proj.weight"
    for tensor, message in (
        (everything[key][:, :80].copy(), rf"{key} must have the shape \[64, 96\] that config.json asks for, got \[64, 80\]"),
        (everything[key].view(np.uint8)[:, ::2].copy(), f"{key} must have one of the dtypes BF16, F16, F32, F64, got F8_E4M3"),
        (None, f"the checkpoint must hold {key}"),
    ):
        changed = {name: value for name, value in (everything | {key: tensor}).items() if value is not None}
        checkpoints.write_shard(source / "model.safetensors", changed)
        with pytest.raises(CheckpointError, match=message):
            checkpoints.quantize(source, out)
        assert [path.name for path in out.parent.iterdir()] == ["source"]


def test_a_nan_is_named(source: Path, out: Path) -> None:
    everything = checkpoints.tensors()
    everything["model.layers.1.self_attn.k_proj.weight"][7, 3] = 0x7FC0
    checkpoints.write_shard(source / "model.safetensors", everything)
    with pytest.raises(CodeRangeError, match="model.layers.1.self_attn.k_proj must be finite, got a NaN or an infinity in row 7"):
        checkpoints.quantize(source, out)


def test_a_source_that_is_quantized_already(made: Path, out: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="weights quantized with septet; start from the original model"):
        checkpoints.quantize(made, out)


def test_a_source_that_is_not_there(tmp_path: Path, out: Path) -> None:
    with pytest.raises(CheckpointError, match="must be a model directory, got nothing there"):
        checkpoints.quantize(tmp_path / "nowhere", out)
    with pytest.raises(CheckpointError, match="got nothing there; check the path"):
        checkpoints.quantize(tmp_path / "model.gguf", out)


# writing


def test_a_run_that_fails_before_it_has_made_anything_leaves_nothing(source: Path, tmp_path: Path) -> None:
    everything = checkpoints.tensors()
    everything["model.embed_tokens.weight"][7, 3] = 0x7FC0
    checkpoints.write_shard(source / "model.safetensors", everything)
    for resume in (False, True):
        with pytest.raises(CodeRangeError, match="row 7"):
            checkpoints.quantize(source, tmp_path / "new" / "folder" / "out", resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_somebody_else_put_into_an_unfinished_run_stays(source: Path, out: Path, tmp_path: Path) -> None:
    def crash(directory: object, options: object) -> list:
        (tmp_path / "out.partial" / "thesis.txt").write_text("mine")
        raise UnsupportedModelError("a model must have layers", "none", "choose another one")

    with pytest.raises(UnsupportedModelError):
        quantize_checkpoint(source, out, checkpoint.QuantizeOptions(), Hooks(crash))
    assert [file.name for file in (tmp_path / "out.partial").iterdir()] == ["thesis.txt"]


def test_a_full_disk_keeps_what_is_done(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(CheckpointError, match="got No space left on device; make room and run the same command with --resume"):
            checkpoints.quantize(source, out)
    assert checkpoints.quantize(source, out, resume=True)


def test_a_place_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(CheckpointError, match="must be writable, got Not a directory; choose a writable place"):
        checkpoints.quantize(source, tmp_path / "file" / "out")


def test_nothing_is_overwritten(source: Path, out: Path, tmp_path: Path) -> None:
    out.mkdir()
    with pytest.raises(CheckpointError, match="must not exist"):
        checkpoints.quantize(source, out)
    with pytest.raises(CheckpointError, match="no septet.json in it"):
        checkpoints.quantize(source, out, resume=True)
    partial = tmp_path / "other.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="other files; move them away"):
        checkpoints.quantize(source, tmp_path / "other", resume=True)
    assert [file.name for file in partial.iterdir()] == ["thesis.txt"]


def test_two_runs_and_other_options_keep_apart(source: Path, out: Path) -> None:
    workspace = Workspace(out, {"options": 1}, resume=False)
    with pytest.raises(CheckpointError, match="one run at a time"):
        Workspace(out, {"options": 1}, resume=True)
    workspace.record("job", crc32={}, layers={})
    workspace.close()
    with pytest.raises(CheckpointError, match="same source and options, got other options"):
        Workspace(out, {"options": 2}, resume=True)


def test_a_json_file_without_an_end_takes_no_memory(source: Path, out: Path) -> None:
    (source / "config.json").unlink()
    (source / "config.json").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="config.json must have at most 100000000 bytes"):
        checkpoints.quantize(source, out)


@pytest.mark.parametrize(
    "options",
    [
        {"code": "vq"},
        {"bits_per_weight": 2.5},
        {"bits_per_weight": float("nan"), "allocation": "measured"},
        {"bits_per_weight": float("inf"), "allocation": "measured"},
        {"seed": -1},
        {"seed": 1 << 32},
        {"calibration_tokens": 1 << 60},
        {"code": "split", "bits_per_weight": 4.0},
        {"head": "fp4"},
        {"rotation_block": 96},
    ],
)
def test_unknown_options(options: dict) -> None:
    with pytest.raises(OptionError, match="must be"):
        checkpoint.QuantizeOptions(**options)


def test_a_gguf_source_is_converted_once(source: Path, out: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    calls = []

    def convert(file: Path, directory: Path) -> None:
        calls.append(file)
        checkpoints.write_model(directory)

    def crash(event: object) -> None:
        if event.stage == "copy":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "model.gguf", out, checkpoint.QuantizeOptions(), Hooks(checkpoints.plan, crash, convert))
    quantize_checkpoint(
        tmp_path / "model.gguf", out, checkpoint.QuantizeOptions(), Hooks(checkpoints.plan, convert_gguf=convert), resume=True
    )
    assert len(calls) == 1
    checkpoints.quantize(source, tmp_path / "direct")
    assert checkpoints.contents(out)["model.safetensors"] == checkpoints.contents(tmp_path / "direct")["model.safetensors"]
    assert "source" not in [path.name for path in out.iterdir()]
