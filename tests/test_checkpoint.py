"""Quantizing a checkpoint: what it holds, that its bytes depend on nothing else, that an interruption costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from checkpoints import out, source  # noqa: F401 (fixtures)
from septet import checkpoint
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.stream import Hooks, Progress, quantize_checkpoint
from septet.checkpoint.tensor_file import StoredMatrix, open_tensor_file
from septet.errors import CheckpointError
from septet.quantize import quantize_split, quantize_trellis

# ruff: noqa: F811 (fixtures are imported names)

GROUP = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]


def quantization_config(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())["quantization_config"]


def arrays(path: Path) -> dict[str, np.ndarray]:
    """What the safetensors library reads, but for BF16, which NumPy lacks."""
    from safetensors import safe_open

    kept = [key for key, entry in open_tensor_file(path).entries.items() if entry.dtype != "BF16"]
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in kept}


# what it holds


@pytest.mark.parametrize("code", ["trellis", "split"])
def test_layers_are_what_the_quantizers_make(code: str, source: Path, out: Path) -> None:
    checkpoints.quantize(source, out, code=code)
    stored, layers = arrays(out / "model.safetensors"), quantization_config(out)["layers"]
    dense = open_tensor_file(source / "model.safetensors")
    weights = [StoredMatrix(dense, f"{name}.weight")[:] for name in GROUP]
    made = quantize_trellis(weights, GROUP) if code == "trellis" else [quantize_split(weight) for weight in weights]
    for name, quantized in zip(GROUP, made):
        assert layers[name] == quantized.config() | {"role": "linear"}
        for part, array in quantized.tensors().items():
            assert np.array_equal(stored[f"{name}.{part}"], array)
    assert layers["model.embed_tokens"]["tied"] == ["lm_head"]
    assert stored["model.embed_tokens.weight"].dtype == np.int8


def test_everything_else_travels_byte_for_byte(source: Path, out: Path) -> None:
    checkpoints.quantize(source, out)
    before, after = open_tensor_file(source / "model.safetensors"), open_tensor_file(out / "model.safetensors")
    for key in ("model.norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.steps"):
        assert after.entries[key].dtype == before.entries[key].dtype
        assert after.read(key).tobytes() == before.read(key).tobytes()
    for name, content in checkpoints.COMPANIONS.items():
        assert (out / name).read_bytes() == content
    config = json.loads((out / "config.json").read_text())
    config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*checkpoints.COMPANIONS, "config.json", "model.safetensors", "septet.json"]
    )


def test_checksums_are_crc32_of_every_tensor(source: Path, out: Path) -> None:
    checkpoints.quantize(source, out)
    file = open_tensor_file(out / "model.safetensors")
    assert quantization_config(out)["crc32"] == {key: f"{zlib.crc32(file.read(key).tobytes()):08x}" for key in file.entries}


def test_wide_dtypes_lie_first_so_that_all_are_aligned(source: Path, out: Path) -> None:
    checkpoints.quantize(source, out)
    sizes = {"I64": 8, "F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1}
    assert all(entry.start % sizes[entry.dtype] == 0 for entry in open_tensor_file(out / "model.safetensors").entries.values())


def test_a_head_that_is_kept_and_one_that_is_untied(source: Path, tmp_path: Path) -> None:
    checkpoints.quantize(source, tmp_path / "keep", head="keep")
    assert open_tensor_file(tmp_path / "keep" / "model.safetensors").entries["model.embed_tokens.weight"].dtype == "BF16"

    def untied(directory, options):
        head = checkpoints.LayerPlan("lm_head", "linear", (50, 64), "lm_head", "trellis", 8, "head", source="model.embed_tokens")
        return [head, *checkpoints.plan(directory, options)]

    quantize_checkpoint(source, tmp_path / "untied", QuantizeOptions(head="trellis"), Hooks(untied))
    entries = open_tensor_file(tmp_path / "untied" / "model.safetensors").entries
    assert entries["model.embed_tokens.weight"].dtype == "BF16" and entries["lm_head.weight"].dtype == "U8"
    assert json.loads((tmp_path / "untied" / "config.json").read_text())["tie_word_embeddings"] is False


def test_conv1d_weights_are_read_transposed(source: Path, tmp_path: Path) -> None:
    everything = checkpoints.tensors()
    names = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    plain, turned = checkpoints.write_model(tmp_path / "plain"), checkpoints.write_model(tmp_path / "turned")
    for name in names:
        everything[f"{name}.weight"] = np.ascontiguousarray(everything[f"{name}.weight"].T)
    checkpoints.write_shard(turned / "model.safetensors", everything)

    def conv1d(directory, options):
        layers = checkpoints.plan(directory, options)
        return [checkpoints.LayerPlan(x.name, "conv1d", x.shape, x.group, x.code, 7) if x.name in names else x for x in layers]

    checkpoints.quantize(plain, tmp_path / "a")
    quantize_checkpoint(turned, tmp_path / "b", QuantizeOptions(), Hooks(conv1d))
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    assert quantization_config(tmp_path / "b")["layers"][names[0]]["transposed"] is True


def test_inspect_counts_every_byte(source: Path, out: Path) -> None:
    checkpoints.quantize(source, out)
    found = checkpoint.inspect(out)
    file = open_tensor_file(out / "model.safetensors")
    totals = found["totals"]
    assert totals["size_bytes_total"] == sum(entry.size_bytes for entry in file.entries.values())
    row = next(row for row in found["tensors"] if row["name"] == GROUP[1])
    assert row["shape"] == [32, 64] and row["bits"] == 3.5 and 0.05 < row["relative_error"] < 0.12
    assert row["size_bytes"] == sum(entry.size_bytes for key, entry in file.entries.items() if key.startswith(GROUP[1]))
    linear = [row for row in found["tensors"] if row["role"] == "linear"]
    assert totals["effective_bits"] == 8 * sum(row["size_bytes"] for row in linear) / sum(np.prod(row["shape"]) for row in linear)
    assert [row["name"] for row in found["tensors"] if row["role"] == "head"] == ["model.embed_tokens"]


# its bytes depend on nothing else


def test_same_bytes_on_every_run_and_number_of_threads(source: Path, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 1), ("c", 2)):
        checkpoints.quantize(source, tmp_path / name, threads=threads)
    assert checkpoints.contents(tmp_path / "a") == checkpoints.contents(tmp_path / "b") == checkpoints.contents(tmp_path / "c")


def test_shards_on_both_sides(tmp_path: Path) -> None:
    source = checkpoints.write_model(tmp_path / "source", shards=3)
    checkpoints.quantize(source, tmp_path / "one")
    checkpoints.quantize(checkpoints.write_model(tmp_path / "single"), tmp_path / "two", max_shard_bytes=9000)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "two").glob("*.safetensors"))
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards
    assert quantization_config(tmp_path / "one")["layers"] == quantization_config(tmp_path / "two")["layers"]
    for path in (tmp_path / "one", tmp_path / "two"):
        assert not checkpoint.verify(path).problems


# an interruption costs nothing


class Interrupted(Exception):
    """Stands for a crash in the middle of a run."""


@pytest.mark.parametrize("events", [3, 4, 6, 9, 12, 15])
def test_resuming_after_a_crash_gives_the_same_bytes(events: int, source: Path, out: Path, tmp_path: Path) -> None:
    checkpoints.quantize(source, tmp_path / "whole")
    left = events

    def crash(event: Progress) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        quantize_checkpoint(source, out, QuantizeOptions(), Hooks(checkpoints.plan, crash))
    assert not out.exists()
    with pytest.raises(CheckpointError, match="unfinished run; go on with --resume"):
        checkpoints.quantize(source, out)
    assert checkpoints.quantize(source, out, resume=True)
    assert checkpoints.contents(out) == checkpoints.contents(tmp_path / "whole")


RUN = "import checkpoints, sys; from pathlib import Path; checkpoints.quantize(Path(sys.argv[1]), Path(sys.argv[2]), resume=True)"


def test_resuming_after_kill_9_gives_the_same_bytes(source: Path, out: Path, tmp_path: Path) -> None:
    checkpoints.quantize(source, tmp_path / "whole")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "SEPTET_BACKEND": "reference"}
    journal = tmp_path / "out.partial" / "journal"
    for lines in (2, 4):
        process = subprocess.Popen([sys.executable, "-c", RUN, source, out], env=environment)
        deadline = time.monotonic() + 120
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() and journal.exists()
        with journal.open("ab") as file:
            file.write(b'01234567 {"job": "model.lay')  # a line that the crash tore
    assert checkpoints.quantize(source, out, resume=True)
    assert checkpoints.contents(out) == checkpoints.contents(tmp_path / "whole")


def test_data_that_changed_since_the_crash_is_made_again(source: Path, out: Path, tmp_path: Path) -> None:
    checkpoints.quantize(source, out)
    partial = tmp_path / "out.partial"
    before = checkpoints.contents(out)
    interrupt(source, out, partial)
    shard = partial / "model.safetensors"
    damaged = bytearray(shard.read_bytes())
    damaged[-1000] ^= 1
    shard.write_bytes(damaged)
    assert checkpoints.quantize(source, out, resume=True)
    assert checkpoints.contents(out) == before


def interrupt(source: Path, out: Path, partial: Path) -> None:
    """Leave a partial run with everything done but the files beside the weights."""

    def crash(event: Progress) -> None:
        if event.stage == "finish":
            raise Interrupted

    for file in out.iterdir():
        file.unlink()
    out.rmdir()
    with pytest.raises(Interrupted):
        quantize_checkpoint(source, out, QuantizeOptions(), Hooks(checkpoints.plan, crash))
    assert partial.exists()


def test_a_crash_before_the_rename_only_needs_the_rename(source: Path, out: Path, tmp_path: Path) -> None:
    checkpoints.quantize(source, out)
    before = checkpoints.contents(out)
    out.rename(tmp_path / "out.partial")
    assert checkpoints.quantize(source, out, resume=True)
    assert checkpoints.contents(out) == before
    out.rename(tmp_path / "out.partial")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="other options"):
            checkpoints.quantize(source, out, resume=True, seed=1)
    assert checkpoints.quantize(source, out, resume=True)
    assert checkpoints.contents(out) == before


@pytest.mark.parametrize("line", [0, 1, 2, 3])
@pytest.mark.parametrize("damage", ["bit", "cut", "nul", "json"])
def test_a_damaged_journal_is_refused_or_its_jobs_are_done_again(line: int, damage: str, source: Path, out: Path, tmp_path: Path) -> None:
    checkpoints.quantize(source, out)
    before, partial = checkpoints.contents(out), tmp_path / "out.partial"
    interrupt(source, out, partial)
    lines = (partial / "journal").read_bytes().splitlines(keepends=True)
    whole = lines[line]
    flipped = whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]
    lines[line] = {"bit": flipped, "cut": whole[:30] + b"\n", "nul": bytes(20) + b"\n", "json": b"[1]\n"}[damage]
    (partial / "journal").write_bytes(b"".join(lines))
    if line == 0:
        with pytest.raises(CheckpointError, match="must begin with what is being made, got a damaged line; delete .*out.partial"):
            checkpoints.quantize(source, out, resume=True)
        assert (partial / "journal").read_bytes() == b"".join(lines)
    else:
        assert checkpoints.quantize(source, out, resume=True)
        assert checkpoints.contents(out) == before


# what --resume means, and what is refused


def test_resume_on_a_missing_out_starts_and_on_a_finished_one_does_nothing(source: Path, out: Path) -> None:
    assert checkpoints.quantize(source, out, resume=True)
    assert not checkpoints.quantize(source, out, resume=True)
    with pytest.raises(CheckpointError, match="must not exist"):
        checkpoints.quantize(source, out)
    with pytest.raises(CheckpointError, match="other bits_per_weight"):
        checkpoints.quantize(source, out, resume=True, bits_per_weight=4.0)
    other = checkpoints.write_model(out.with_name("other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="must have been made from .*, got another source"):
        checkpoints.quantize(other, out, resume=True)
