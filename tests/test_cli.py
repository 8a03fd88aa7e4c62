"""The command line's frame, and the commands that do not run a model: info, quantize, inspect, verify."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command import assert_error, broken, flip_last_byte, quantized, septet, septet_json, septet_process  # noqa: F401 (fixtures)
from septet import kernels
from septet.errors import OptionError
from septet.quantize.threads import default_threads

# ruff: noqa: F811 (fixtures are imported names)


def test_help_names_every_command_in_order() -> None:
    listed = septet("--help").stdout.split("Commands")[1]
    places = [listed.index(f" {name} ") for name in ("demo", "quantize", "run", "chat", "eval", "inspect", "verify", "info")]
    assert places == sorted(places)


def test_help_says_which_models_a_command_takes() -> None:
    for command in (("verify",), ("inspect",), ("bench", "model"), ("run",), ("eval",)):
        packed_only = command[0] not in ("run", "eval")
        assert (".gguf" in septet(*command, "--help").stdout.split("DIR", 2)[2].split("Options")[0]) is not packed_only


def test_help_is_light() -> None:
    code = "import atexit, sys; atexit.register(lambda: print(sorted({'numpy', 'torch', 'transformers'} & set(sys.modules))));"
    code += "from septet.cli import app; app(['--help'])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip().endswith("[]")


@pytest.mark.parametrize("line", ["nonsense", "run", "quantize a b --code vq", "eval model", "run a b --seed x", "info extra"])
def test_wrong_usage_exits_with_2(line: str) -> None:
    result = septet(*line.split())
    assert result.exit_code == 2
    assert result.stdout == "" and "Usage: septet" in result.stderr


def test_version() -> None:
    from septet import __version__

    assert septet("--version").stdout.strip() == __version__


def test_traceback_only_with_debug(tmp_path: Path) -> None:
    assert_error(septet("verify", tmp_path / "none"), "config.json must be readable")
    for arguments in (["--debug", "verify", tmp_path / "none"], ["verify", tmp_path / "none", "--debug"]):
        result = septet(*arguments)
        assert result.exit_code == 1 and "Traceback" in result.stderr and "hint: check that" in result.stderr


def test_an_unexpected_error_keeps_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise PermissionError(13, "Permission denied", "/somewhere") from error

    monkeypatch.setattr("septet.cli.info.collect", fail)
    result = septet("info")
    assert result.exit_code == 1 and "Traceback" not in result.stderr
    assert "error: [Errno 13] Permission denied: '/somewhere' (caused by KeyError: 'inner')\n\nhint: check the path" in result.stderr
    monkeypatch.setattr("septet.cli.info.collect", lambda: bytes(1 << 62))
    assert "error: the memory of this machine must suffice, got no more\n\nhint: use smaller sizes" in septet("info").stderr
    monkeypatch.setattr("septet.cli.info.collect", lambda: {}["missing"])
    assert "error: KeyError: 'missing'\n\nhint: septet did not expect this" in septet("info").stderr


# ---- info ----


def test_info() -> None:
    found = septet_json("info")
    assert found["backend"] in [name for name, reason in found["backends"].items() if reason is None]
    assert set(found["backends"]) == set(kernels.available_backends())
    assert found["versions"]["septet"] and found["versions"]["torch"]
    if found["backend"] == "native":
        assert found["instruction_sets"][found["instruction_set"]] is None
    assert found["backend"] in septet("info").stdout


def test_info_obeys_the_environment() -> None:
    forced = septet_process("info", "--json", SEPTET_BACKEND="reference")
    assert json.loads(forced.stdout)["backend"] == "reference"
    assert_error(septet_process("info", SEPTET_BACKEND="abacus"), "abacus", "reference (available)")


def test_threads_must_be_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(septet_process("info", "--json", SEPTET_THREADS="", OMP_NUM_THREADS="3,1").stdout)["threads"] == 3
    assert_error(septet_process("info", SEPTET_THREADS="²"), "SEPTET_THREADS=²")
    monkeypatch.setenv("SEPTET_THREADS", "²")
    with pytest.raises(OptionError, match="SEPTET_THREADS must be a positive number, got '²'"):
        default_threads()


def test_no_color_is_respected() -> None:
    assert "\x1b[" not in septet_process("info", NO_COLOR="1", FORCE_COLOR="").stdout


# ---- quantize, inspect, verify ----


def test_quantize_says_what_it_made(tiny_model_dir: Path, tmp_path: Path) -> None:
    options = "--bits 3 --head keep --seed 5 --activations float".split()
    made = septet_json("quantize", tiny_model_dir, tmp_path / "out", "--effort", 0, *options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["bits_per_weight"], config["head"], config["seed"], config["activations"]) == (3.0, "keep", 5, "float")
    assert made["bits_per_weight"] == 3.0 and made["totals"]["effective_bits"] > 3.0
    assert not (tmp_path / "out.partial").exists()


def test_quantize_does_not_depend_on_threads(tiny_model_dir: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    assert septet("quantize", tiny_model_dir, tmp_path / "out", "--effort", "0", "--threads", "2").exit_code == 0
    files = sorted(file.name for file in quantized["trellis"].iterdir())
    assert files == sorted(file.name for file in (tmp_path / "out").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (quantized["trellis"] / name).read_bytes(), name


def test_quantize_refuses_to_overwrite_and_resumes(tiny_model_dir: Path, quantized: dict[str, Path], tmp_path: Path) -> None:
    assert_error(septet("quantize", tiny_model_dir, quantized["trellis"]), "must not exist", "--resume")
    assert septet_json("quantize", tiny_model_dir, quantized["trellis"], "--effort", "0", "--resume")["already_finished"] is True
    assert septet("quantize", tiny_model_dir, tmp_path / "new", "--effort", "0", "--resume").exit_code == 0
    assert (tmp_path / "new" / "config.json").is_file()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--calibration", "text.txt"], ["the text must be a readable file", "text.txt"]),
        (["--effort", "0", "--calibration", "self"], ["efforts above 0 and calibration need each other"]),
        (["--effort", "2", "--calibration", "none"], ["efforts above 0 and calibration need each other"]),
        (["--device", "gpu"], ["device must be cpu, cuda or cuda:N, got gpu", "correct the option"]),
        (["--seed", "-1"], ["seed must be in 0..4294967295, got -1"]),
        (["--bits", "nan"], ["bits of code trellis must be 3.0 to 4.0", "got nan"]),
        (["--calibration", "."], ["the text must be a readable file", "Is a directory"]),
        (["--bits", "5"], ["bits of code trellis must be 3.0 to 4.0", "got 5.0"]),
        (["--code", "split", "--bits", "3"], ["bits of code split must be 3.5, got 3.0"]),
    ],
)
def test_quantize_refuses_options(tiny_model_dir: Path, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    assert_error(septet("quantize", tiny_model_dir, tmp_path / "out", *options), *parts)
    assert list(tmp_path.iterdir()) == []


def test_quantize_refuses_sources(quantized: dict[str, Path], tmp_path: Path) -> None:
    assert_error(septet("quantize", tmp_path / "none", tmp_path / "out"), "nothing there")
    assert_error(septet("quantize", quantized["split"], tmp_path / "out"), "must be unquantized")
    (tmp_path / "bad.gguf").write_bytes(b"nothing like it")
    assert_error(septet("quantize", tmp_path / "bad.gguf", tmp_path / "other"), "must start with GGUF")


@pytest.mark.parametrize("code", ["trellis", "split"])
def test_inspect_counts_every_byte(quantized: dict[str, Path], code: str) -> None:
    found = septet_json("inspect", quantized[code])
    rows = {row["name"]: row for row in found["tensors"]}
    row = rows["model.layers.1.mlp.down_proj"]
    assert row["shape"] == [64, 192] and row["code"] == code and row["bits"] == 3.5
    assert row["effective_bits"] == 8 * row["size_bytes"] / (64 * 192) > 3.5
    assert 0 < row["relative_error"] < 0.5
    assert len([row for row in found["tensors"] if row["role"] == "linear"]) == 14
    stored = sum(shard.stat().st_size for shard in quantized[code].glob("*.safetensors"))
    assert stored - 16384 < found["totals"]["size_bytes_total"] < stored
    shown = septet("inspect", quantized[code]).stdout
    assert "model.layers.1.mlp.down_proj" in shown and "total without embeddings" in shown


def test_verify(quantized: dict[str, Path], broken: Path) -> None:
    assert septet("verify", quantized["trellis"]).stdout.startswith("intact: ")
    assert septet_json("verify", quantized["split"])["problems"] == []
    flip_last_byte(broken)
    result = septet("verify", broken, "--json")
    assert json.loads(result.stdout)["intact"] is False
    assert_error(result, "model.safetensors")
