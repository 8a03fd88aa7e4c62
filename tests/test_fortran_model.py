"""septet-fortran: logits and texts are those of transformers, in every kind of head and code, and a damaged checkpoint is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fortran_build import COMMANDS, compile_objects, link
from needs import reason

if not COMMANDS:
    pytest.skip(reason("fortran", "the kernels of septet in C++ are tested without"), allow_module_level=True)

import small_models
import tolerances
from command import assert_error, flip_last_byte, quantized, septet  # noqa: F401
from septet.generate import Sampling, generate_tokens
from septet.loading import load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
IDS = [83, 101, 118, 101, 110, 32, 98, 105, 116, 115]


@pytest.fixture(scope="module", params=COMMANDS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """septet-fortran from each compiler, with bounds checked."""
    folder = tmp_path_factory.mktemp(f"program-{request.param}")
    compile_objects(request.param, folder)
    return link(request.param, folder, "model/main.f90")


@pytest.fixture(scope="module")
def models(quantized: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """Checkpoints of every kind that the program reads."""
    folder = tmp_path_factory.mktemp("models")
    source = small_models.save("llama-untied", folder / "untied")
    kinds = {"head-int8": (), "head-trellis": ("--head", "trellis"), "head-keep": ("--head", "keep"), "6-bits": ("--bits", "3.0")}
    for kind, options in kinds.items():
        result = septet("quantize", source, folder / kind, *options)
        assert result.exit_code == 0, result.stderr
    return {**quantized, **{kind: folder / kind for kind in kinds}}


KINDS = ("trellis", "split", "head-int8", "head-trellis", "head-keep", "6-bits")


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def logits_of(program: Path, directory: Path, ids: list[int], activations: str, target: Path) -> np.ndarray:
    """float32 [vocabulary] after a prompt."""
    prompt = ",".join(map(str, ids))
    done = run(program, directory, prompt, "--ids", "--tokens", 0, "--activations", activations, "--logits", target)
    assert done.returncode == 0 and not done.stdout, done.stderr
    return np.fromfile(target, np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(program: Path, models: dict[str, Path], kind: str, tmp_path: Path) -> None:
    wanted = {}
    for activations in ("float", "int8"):
        model = load_model(models[kind], torch.float32, activations)
        with torch.inference_mode():
            wanted[activations] = model(input_ids=torch.tensor([IDS])).logits[0, -1].numpy()
    found = {name: logits_of(program, models[kind], IDS, name, tmp_path / name) for name in wanted}
    assert np.abs(found["float"] - wanted["float"]).max() <= tolerances.FLOAT32_LOGITS * np.abs(wanted["float"]).max()
    cost = np.abs(wanted["int8"] - wanted["float"]).max()
    assert 0 < np.abs(found["int8"] - found["float"]).max()
    assert np.abs(found["int8"] - wanted["int8"]).max() <= tolerances.INT8_LOGITS * cost


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_that_of_transformers(program: Path, models: dict[str, Path], kind: str) -> None:
    """Twenty tokens one by one: the cache holds what a longer prompt would have given."""
    model = load_model(models[kind], torch.float32, "float")
    wanted = list(generate_tokens(model, IDS, Sampling(max_new_tokens=20)))
    prompt = ",".join(map(str, IDS))
    done = run(program, models[kind], prompt, "--ids", "--tokens", 20, "--activations", "float")
    ends = model.config.eos_token_id
    assert [int(token) for token in done.stdout.split()] == wanted[: wanted.index(ends) if ends in wanted else None]


def test_text_goes_through_the_exported_tokenizer(program: Path, quantized: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    directory, exported = quantized["trellis"], tmp_path / "tokens"
    subprocess.run([sys.executable, ROOT / "tools" / "export_tokenizer.py", directory, exported], check=True)
    tokenizer = load_tokenizer(directory)
    for text in ("Seven bits", "it's  a\n\ttest: 12 x 34!", "\u00e9tude"):
        options = ["--tokenizer", exported, "--tokens", 0, "--logits", tmp_path / "text"]
        assert run(program, directory, text, *options, "--activations", "float").returncode == 0
        by_ids = logits_of(program, directory, tokenizer(text)["input_ids"], "float", tmp_path / "ids")
        assert np.fromfile(tmp_path / "text", np.float32).tobytes() == by_ids.tobytes()
    text = run(program, directory, "Seven", "--tokenizer", exported, "--tokens", 8).stdout
    ids = run(program, directory, ",".join(map(str, tokenizer("Seven")["input_ids"])), "--ids", "--tokens", 8).stdout
    assert text.rstrip("\n") == tokenizer.decode([int(token) for token in ids.split()], errors="replace")


def test_words_and_merges_are_those_of_the_original(program: Path, quantized: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    """A BPE of 260 tokens, trained on SPEC.md: its lines, and texts with every kind of character side by side, give the same tokens."""
    import tokenizers

    spec = (ROOT / "SPEC.md").read_text(encoding="ascii", errors="ignore")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator([spec], tokenizers.trainers.BpeTrainer(vocab_size=260, show_progress=False))
    (tmp_path / "tokenizer.json").write_text(trained.to_str())
    subprocess.run([sys.executable, ROOT / "tools" / "export_tokenizer.py", tmp_path], check=True)
    texts = [*spec.splitlines()[10:60:7], "it's they'll  we've   12345 a1b2\n\n\n  x\t\ty ((z)) ''s 'tis", "   ", "end \n"]
    merged = 0
    for text in filter(None, texts):
        ids = trained.encode(text).ids
        merged += len(text) - len(ids)
        options = ["--tokenizer", tmp_path / "tokenizer.septok", "--tokens", 0, "--logits", tmp_path / "text"]
        done = run(program, quantized["trellis"], text, *options, "--activations", "float")
        assert done.returncode == 0, done.stderr
        by_ids = logits_of(program, quantized["trellis"], ids, "float", tmp_path / "ids")
        assert (tmp_path / "text").read_bytes() == by_ids.tobytes(), text
    assert merged > 100


def test_a_seed_repeats_a_text(program: Path, quantized: dict[str, Path]) -> None:  # noqa: F811
    arguments = quantized["split"], "1,2,3", "--ids", "--tokens", 12, "--temperature", 1.5
    texts = [run(program, *arguments, "--seed", seed).stdout for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2] and texts[0]


def test_wrong_arguments_are_refused(program: Path, quantized: dict[str, Path]) -> None:  # noqa: F811
    directory = quantized["trellis"]
    assert_error(run(program, directory), "usage:")
    assert_error(run(program, directory / "nowhere", "1", "--ids"), "config.json")
    assert_error(run(program, directory, "hello"), "tokenizer")
    assert_error(run(program, directory, "1,99999", "--ids"), "below 260")
    assert_error(run(program, directory, "-1", "--ids", "--tokens", "many"), "--tokens")
    assert_error(run(program, directory, "1", "--ids", "--activations", "int4"), "int4")
    assert_error(run(program, directory, ",".join(["1"] * 1025), "--ids"), "at most 1024 tokens")


def change_config(directory: Path, change) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config, config["quantization_config"])
    path.write_text(json.dumps(config))


def change_header(directory: Path, old: bytes, new: bytes) -> None:
    path = directory / "model.safetensors"
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))


Q = "model.layers.0.self_attn.q_proj"
DAMAGE = {
    "bit": (flip_last_byte, "CRC-32"),
    "short": (lambda path: (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-9]), "lie in the file"),
    "empty": (lambda path: (path / "model.safetensors").write_bytes(b""), "header"),
    "long header": (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 7 + b"\x7f{}"), "header"),
    "no header": (lambda path: (path / "model.safetensors").write_bytes(b"\x10" + bytes(7) + b"[" * 16), "no such tensor"),
    "dtype": (lambda path: change_header(path, b'"dtype":"U8"', b'"dtype":"I8"'), "U8"),
    "shape": (lambda path: change_header(path, b'"shape":[64]', b'"shape":[65]'), "shape"),
    "no config": (lambda path: (path / "config.json").unlink(), "config.json"),
    "broken config": (lambda path: (path / "config.json").write_text('{"model_type": "lla'), "septet checkpoint"),
    "version": (lambda path: change_config(path, lambda _, q: q.update(format_version=7)), "format_version"),
    "code": (lambda path: change_config(path, lambda _, q: q["layers"][Q].update(code="vq")), "trellis, split or int8"),
    "bits": (lambda path: change_config(path, lambda _, q: q["layers"][Q].update(bits_per_pair=99)), "possible"),
    "block": (lambda path: change_config(path, lambda _, q: q["layers"][Q].update(input_block=48)), "possible"),
    "features": (lambda path: change_config(path, lambda _, q: q["layers"][Q].update(in_features=10**15)), "possible"),
    "other features": (lambda path: change_config(path, lambda _, q: q["layers"][Q].update(in_features=128)), "shape"),
    "heads": (lambda path: change_config(path, lambda c, _: c.update(num_key_value_heads=3)), "heads"),
    "model": (lambda path: change_config(path, lambda c, _: c.update(model_type="gpt2")), "model_type"),
    "no checksum": (lambda path: change_config(path, lambda _, q: q.pop("crc32")), "CRC-32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error(program: Path, quantized: dict[str, Path], damage: str, tmp_path: Path) -> None:  # noqa: F811
    broken = Path(shutil.copytree(quantized["trellis"], tmp_path / "broken"))
    change, message = DAMAGE[damage]
    change(broken)
    assert_error(run(program, broken, "1,2", "--ids", "--tokens", 1), message)
