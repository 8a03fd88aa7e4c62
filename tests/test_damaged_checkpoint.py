"""Finding damage in a septet checkpoint: `verify` names every kind of it, `inspect` refuses what contradicts itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import intact, made  # noqa: F401 (fixtures)
from septet import checkpoint
from septet.checkpoint.tensor_file import open_tensor_file
from septet.errors import CheckpointError, SpecVersionError, UnsupportedModelError

# ruff: noqa: F811 (fixtures are imported names)

KEY = "model.layers.0.self_attn.q_proj"


def edit_config(path: Path, change: Callable[[dict], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


def problems(path: Path) -> list[str]:
    return [str(problem) for problem in checkpoint.verify(path).problems]


def test_an_intact_checkpoint_has_no_problems(made: Path) -> None:
    report = checkpoint.verify(made)
    assert not report.problems
    stored = open_tensor_file(made / "model.safetensors").entries
    assert (report.files, report.tensors, report.layers) == (6, len(stored), 9)


@pytest.mark.parametrize("key", [f"{KEY}.weight", f"{KEY}.weight_scale", "model.norm.weight", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found_in_its_tensor(key: str, made: Path) -> None:
    shard = made / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[open_tensor_file(shard).entries[key].start + 1] ^= 0x10
    shard.write_bytes(content)
    found = problems(made)
    assert len(found) == 2
    assert found[0].startswith("model.safetensors must have the SHA-256")
    assert found[1].startswith(f"{key} must have the CRC")


def test_a_flipped_bit_in_a_companion_is_found(made: Path) -> None:
    (made / "tokenizer.json").write_bytes(b'{"model": []}\n')
    assert [problem.split(" must")[0] for problem in problems(made)] == ["tokenizer.json"]


def test_a_truncated_shard_is_found(made: Path) -> None:
    shard = made / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert any("is truncated; fetch it again" in problem for problem in problems(made))
    with pytest.raises(CheckpointError, match="truncated"):
        checkpoint.inspect(made)


def test_another_header_is_found(made: Path) -> None:
    shard = made / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b'"format":"pt"', b'"format":"tp"'))
    assert "headers must be those of septet.json, got other ones in model.safetensors; fetch them again" in problems(made)


@pytest.mark.parametrize("name", ["tokenizer.json", "septet.json", "model.safetensors"])
def test_a_missing_file_is_found(name: str, made: Path) -> None:
    (made / name).unlink()
    assert any(name in problem for problem in problems(made))


CHANGES = {
    "another width": (lambda q: q["layers"][KEY].update(bits_per_pair=6), f"{KEY}.weight must be uint8"),
    "another shape": (lambda q: q["layers"][KEY].update(in_features=128), f"{KEY}.weight must be uint8"),
    "a size that is no number": (lambda q: q["layers"][KEY].update(in_features="64"), "in_features must be a whole number"),
    "a gigantic size": (lambda q: q["layers"][KEY].update(out_features=1 << 60), "out_features must be a whole number"),
    "another code": (lambda q: q["layers"][KEY].update(code="split"), "scale_rows must be a whole number"),
    "a layer without tensors": (lambda q: q["layers"].update(ghost=q["layers"][KEY]), "the checkpoint must hold ghost.weight"),
}


@pytest.mark.parametrize("change, message", CHANGES.values(), ids=CHANGES)
def test_a_description_that_contradicts_the_tensors(change: Callable, message: str, made: Path) -> None:
    edit_config(made, change)
    assert any(message in problem for problem in problems(made))
    with pytest.raises(CheckpointError, match=message):
        checkpoint.inspect(made)


@pytest.mark.parametrize("value", ["0.1", [0.1], True, None, float("nan")])
def test_an_error_that_is_no_number_is_not_shown(value: object, made: Path) -> None:
    edit_config(made, lambda q: q["layers"][KEY].update(relative_error=value))
    shown = [row["relative_error"] for row in checkpoint.inspect(made)["tensors"] if row["name"] == KEY]
    assert shown == [None] or isinstance(value, float)


def test_checksums_must_be_of_exactly_the_stored_tensors(made: Path) -> None:
    edit_config(made, lambda q: q["crc32"].update(ghost=q["crc32"].pop("model.norm.weight")))
    found = problems(made)
    assert any("the checkpoint must hold ghost" in problem for problem in found)
    assert any("config.json must list a crc32 of model.norm.weight" in problem for problem in found)


@pytest.mark.parametrize("part", ["layers", "crc32"])
@pytest.mark.parametrize("value", [None, [], {"a": 1}])
def test_tables_of_another_type(part: str, value: object, made: Path) -> None:
    edit_config(made, lambda q: q.update({part: value}))
    assert any("quantization_config must list" in problem for problem in problems(made))


def test_hashes_of_files_outside_are_not_looked_at(made: Path) -> None:
    hashes = json.loads((made / "septet.json").read_text())
    for name in ("../secret", "/etc/passwd", "", "a\0b"):
        (made / "septet.json").write_text(json.dumps(hashes | {"files": {name: "0" * 64}}))
        assert any("do not trust this checkpoint" in problem for problem in problems(made))


def test_other_versions_and_other_quantizers_are_refused(made: Path) -> None:
    edit_config(made, lambda q: q.update(format_version=9))
    for look in (checkpoint.verify, checkpoint.inspect):
        with pytest.raises(SpecVersionError, match="must be 0, got 9; update septet"):
            look(made)
    edit_config(made, lambda q: q.update(quant_method="gptq"))
    for look in (checkpoint.verify, checkpoint.inspect):
        with pytest.raises(UnsupportedModelError, match="quantized by septet, got quant_method gptq"):
            look(made)
