"""`septet quantize --calibration`: error feedback from the command line, the same bytes with any threads and after an interruption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoints import contents
from command import assert_error, quantized, septet, septet_json, text_file  # noqa: F401
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.stream import Hooks, quantize_checkpoint
from septet.errors import OptionError
from septet.loading import load_model, plan_checkpoint

# ruff: noqa: F811 (fixtures are imported names)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, text_file: Path) -> Path:
    """The tiny model, calibrated on a text."""
    out = tmp_path_factory.mktemp("calibrated") / "out"
    result = septet("quantize", tiny_model_dir, out, "--calibration", text_file)
    assert result.exit_code == 0, result.stderr
    return out


def test_a_text_changes_codes_and_nothing_else(calibrated: Path, quantized: dict[str, Path], text_file: Path) -> None:
    plain, fed = contents(quantized["trellis"]), contents(calibrated)
    differing = {name for name in plain.keys() | fed.keys() if plain.get(name) != fed.get(name)}
    assert differing == {"config.json", "model.safetensors", "septet.json"}
    assert len(plain["model.safetensors"]) == len(fed["model.safetensors"])
    options = json.loads(fed["septet.json"])["options"]
    assert options["calibration"].startswith("sha256:") and str(text_file) not in fed["septet.json"].decode()


def test_a_text_brings_its_own_predictions_closer(
    calibrated: Path, quantized: dict[str, Path], tiny_model_dir: Path, text_file: Path
) -> None:
    arguments = ("--reference", tiny_model_dir, "--text", text_file, "--context", 256)
    plain, fed = (septet_json("eval", path, *arguments)["kld_mean"] for path in (quantized["trellis"], calibrated))
    assert fed < plain


def test_calibrated_bytes_do_not_depend_on_threads_or_interruptions(
    calibrated: Path, tiny_model_dir: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", tiny_model_dir, tmp_path / "out", "--calibration", text_file, "--threads", 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("septet.checkpoint.filling._write_beside", interrupt)
        assert isinstance(septet(*arguments).exception, KeyboardInterrupt | SystemExit)
    assert (tmp_path / "out.partial").is_dir()
    result = septet(*arguments, "--resume")
    assert result.exit_code == 0, result.stderr
    assert contents(tmp_path / "out") == contents(calibrated)


def interrupt(*_: object) -> None:
    """Someone presses Ctrl-C."""
    raise KeyboardInterrupt


def test_a_model_can_write_its_own_text(calibrated: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = ("--calibration", "self", "--calibration-tokens", 1024)
    made = [
        septet_json("quantize", tiny_model_dir, tmp_path / name, *options, *more) for name, more in (("a", ()), ("b", ("--threads", 3)))
    ]
    assert made[0]["calibration"] == "self" and made[0]["calibration_tokens"] == 1024
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(calibrated)


def test_calibration_without_anybody_to_run_the_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="somebody to run the model"):
        quantize_checkpoint(tiny_model_dir, tmp_path / "out", QuantizeOptions(effort=1, calibration="self"), Hooks(plan_checkpoint))
    with pytest.raises(OptionError, match="none, self or sha256"):
        QuantizeOptions(calibration="text.txt")
    from septet.integrations.huggingface import SeptetConfig

    with pytest.raises(OptionError, match="an option must be one of"):
        SeptetConfig(effort=1)


def stored_average(out: Path) -> float:
    """Bits per weight of the linear layers, without scales."""
    layers = json.loads((out / "config.json").read_text())["quantization_config"]["layers"].values()
    sizes = [(entry["in_features"] * entry["out_features"], entry["bits_per_pair"]) for entry in layers if entry["code"] == "trellis"]
    return sum(size * bits for size, bits in sizes) / 2 / sum(size for size, _ in sizes)


@pytest.mark.parametrize("effort", [0, 1, 2])
def test_any_average_between_the_widths(effort: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    made = septet_json("quantize", tiny_model_dir, tmp_path / "out", "--effort", effort, "--bits", 3.3, "--calibration-tokens", 1024)
    assert (made["effort"], made["allocation"], made["bits_per_weight"]) == (effort, "measured", 3.3)
    assert 3.0 < stored_average(tmp_path / "out") <= 3.3
    assert septet("verify", tmp_path / "out").exit_code == 0
    for engine in ("native", "transformers"):
        result = septet("run", tmp_path / "out", "ab", "--max-new-tokens", 2, "--engine", engine)
        assert result.exit_code == 0, result.stderr
    load_model(tmp_path / "out").save_pretrained(tmp_path / "saved")
    assert stored_average(tmp_path / "saved") == stored_average(tmp_path / "out")


def test_effort_3_keeps_what_loses_less(tiny_model_dir: Path, tmp_path: Path) -> None:
    arguments = ("quantize", tiny_model_dir, tmp_path / "out", "--effort", 3, "--calibration-tokens", 1024)
    result = septet(*arguments)
    assert result.exit_code == 0, result.stderr
    losses = {line.split()[0]: float(line.split("KL ")[1].split()[0]) for line in result.stderr.splitlines() if " widths: KL " in line}
    assert set(losses) == {"uniform", "measured"}
    kept = json.loads((tmp_path / "out" / "septet.json").read_text())["options"]["allocation"]
    assert losses[kept] == min(losses.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stored_average(tmp_path / "out") <= 3.5


def test_effort_3_finds_what_it_has_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import septet.cli.quantize as command

    wanted = QuantizeOptions(effort=3, calibration="self")
    asked = []
    monkeypatch.setattr(command, "quantize_with_bar", lambda source, out, options, *_: asked.append(options.allocation))
    for number, made in enumerate([{"allocation": "uniform"}, {"allocation": "measured"}, {"allocation": "measured", "seed": 1}]):
        out = tmp_path / str(number)
        out.mkdir()
        (out / "septet.json").write_text(json.dumps({"options": wanted.as_json() | made}))
        command.quantize_best("source", out, wanted, resume=True)
    # Other options stay other options.
    assert asked == ["uniform", "measured", "uniform"]


@pytest.mark.parametrize("content", ["", "a", "\0"])
def test_a_text_that_is_too_short_leaves_nothing(content: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(content)
    result = septet("quantize", tiny_model_dir, tmp_path / "new" / "out", "--calibration", text)
    assert_error(result, "the text must fill at least 2 windows of 512 tokens", "give a longer text")
    assert list(tmp_path.iterdir()) == [text]
