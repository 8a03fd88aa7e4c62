"""What stands around the engine: draws that follow their options, the tokens of transformers, and the commands that use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import engine_models
from command import PROMPT, assert_error, broken, quantized, septet, septet_json, septet_process  # noqa: F401
from septet import generate
from septet.engine import Engine, Tokenizer
from septet.engine.sampling import Sampler, Sampling
from septet.engine.shape import _windows
from septet.errors import CheckpointError, OptionError, UnsupportedModelError
from septet.loading import load_tokenizer

# ruff: noqa: F811 (fixtures are imported names)

LOGITS = np.log(np.array([0.05, 0.5, 0.15, 0.3], np.float32))


def drawn(count: int = 400, text: tuple[int, ...] = (), **options: float) -> set[int]:
    """Every token that comes up, each draw with a sampler of its own text."""
    return {Sampler(Sampling(seed=seed, **options), text).draw(LOGITS) for seed in range(count)}


# ---- draws ----


def test_draws_follow_the_options() -> None:
    assert drawn(temperature=0.0) == {1}
    assert drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_k=2) == {1, 3}
    assert drawn(temperature=1.0, top_k=9) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_p=0.5) == {1}
    assert drawn(temperature=1.0, top_p=0.51) == {1, 3}
    assert drawn(temperature=1.0, top_p=0.81) == {1, 2, 3}
    assert drawn(temperature=1.0, top_k=3, top_p=0.9) == {1, 2, 3}
    assert drawn(temperature=1.0, top_k=3, top_p=0.84) == {1, 3}
    assert drawn(temperature=1.0, min_p=0.25) == {1, 2, 3}
    assert drawn(temperature=1.0, min_p=0.35) == {1, 3}
    assert drawn(temperature=0.01) == {1}


def test_draws_have_the_probabilities() -> None:
    sampler = Sampler(Sampling(temperature=1.0))
    counts = np.bincount([sampler.draw(LOGITS) for _ in range(20000)], minlength=4) / 20000
    expected = np.exp(LOGITS)
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected / 20000)).all()


def test_the_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = np.array([1.0, 0.9, -2.0, 0.5], np.float32)
    theirs = RepetitionPenaltyLogitsProcessor(1.2)(torch.tensor([[0, 2]]), torch.tensor(logits)[None].clone())[0]
    assert Sampler(Sampling(repetition_penalty=1.2), (0, 2)).draw(logits) == int(theirs.argmax()) == 1
    sampler = Sampler(Sampling(repetition_penalty=3.0))
    assert [sampler.draw(logits) for _ in range(3)] == [0, 1, 3]
    assert logits.tolist() == np.array([1.0, 0.9, -2.0, 0.5], np.float32).tolist()


def test_equal_logits_are_cut_by_their_order() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_k=2))
    assert {sampler.draw(np.zeros(8, np.float32)) for _ in range(100)} == {0, 1}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(CheckpointError, match="finite"):
        Sampler(Sampling()).draw(np.array([0, value], np.float32))


OUT_OF_RANGE = {
    "max_new_tokens": (0,),
    "min_p": (-0.1, 1.1, np.nan),
    "repetition_penalty": (0.0, 1e-300, np.inf, np.nan),
    "seed": (-1,),
    "temperature": (-1.0, np.nan),
    "top_k": (-1,),
    "top_p": (0.0, 1.5, np.nan),
}


@pytest.mark.parametrize("option, value", [(option, value) for option, values in OUT_OF_RANGE.items() for value in values])
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(OptionError, match=option):
        Sampling(**{option: value})


def test_temperatures_at_the_ends() -> None:
    assert drawn(temperature=5e-324) == {1}
    assert drawn(temperature=np.inf) == {0, 1, 2, 3}


# ---- tokens ----


@pytest.mark.parametrize("text", ["Seven bits", "", "a√b\n\n  ünï <user> x", "<bos>"])
def test_tokens_are_those_of_transformers(tiny_model_dir: Path, text: str) -> None:
    ours, theirs = Tokenizer(tiny_model_dir), load_tokenizer(tiny_model_dir)
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    assert generate.chat_prompt(ours, messages) == generate.chat_prompt(theirs, messages)
    assert ours.stop_tokens == {257}


TEMPLATE = """{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
{{ bos_token }}{{ message | tojson }}
{% endfor -%}
{% if add_generation_prompt %}>{% endif %}"""


def test_templates_are_rendered_as_by_transformers(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    messages = [{"role": "user", "content": 'a "quoted" <é>'}]
    ours, theirs = Tokenizer(copy), load_tokenizer(copy)
    assert ours.chat(messages) == generate.chat_prompt(theirs, messages)
    with pytest.raises(CheckpointError, match="no tools"):
        ours.chat([{"role": "tool", "content": ""}])
    (copy / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(CheckpointError, match="chat template"):
        Tokenizer(copy).chat(messages)


BROKEN_TEMPLATES = (b"{{ 1 / 0 }}", b"{{ messages + 1 }}", b"{{ messages[9].role.x }}", b"{{ strftime_now(7) }}", b"{% if %}", b"\xff")


@pytest.mark.parametrize("template", BROKEN_TEMPLATES)
def test_broken_templates(template: bytes, tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    (copy / "chat_template.jinja").write_bytes(template)
    with pytest.raises(CheckpointError, match=r"chat.template.* must .*, got .*; "):
        Tokenizer(copy).chat([{"role": "user", "content": "Hello"}])


def test_templates_with_odd_names(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    config = json.loads((copy / "tokenizer_config.json").read_text())
    entries = [{"name": ["default"], "template": "no"}, 7, {"name": "default", "template": "yes"}]
    (copy / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": entries, "bos_token": ["x"], "eos_token": {"content": 1}})
    )
    assert Tokenizer(copy).chat_template == "yes"


def test_texts_that_are_no_unicode(tiny_model_dir: Path) -> None:
    for tokenizer in (Tokenizer(tiny_model_dir), load_tokenizer(tiny_model_dir)):
        with pytest.raises(OptionError, match="a text must be UTF-8, got a byte that is no character, at place 1"):
            generate.encode(tokenizer, "a\udcff")
        with pytest.raises(OptionError, match="a text must be UTF-8"):
            generate.chat_prompt(tokenizer, [{"role": "user", "content": "\udcff"}])
        assert generate.encode(tokenizer, "a\0b")


def test_damaged_tokenizers(tiny_model_dir: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))
    for content in ('{"model": {}}', "[", "\xff"):
        (copy / "tokenizer.json").write_text(content, encoding="latin-1")
        with pytest.raises(CheckpointError, match="tokenizer.json"):
            Tokenizer(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModelError, match="tokenizer.json"):
        Tokenizer(copy)


# ---- choosing the engine ----


def test_the_engine_is_the_default_where_it_fits(quantized: dict[str, Path], tiny_model_dir: Path) -> None:
    model, tokenizer = generate.load(quantized["trellis"])
    assert isinstance(model, Engine) and isinstance(tokenizer, Tokenizer)
    reasons: list[UnsupportedModelError] = []
    generate.load(tiny_model_dir, on_fallback=reasons.append)
    assert "quantized by septet" in str(reasons[0])
    with pytest.raises(UnsupportedModelError, match="quantized by septet"):
        generate.load(tiny_model_dir, engine="native")
    with pytest.raises(OptionError, match="engine"):
        generate.load(tiny_model_dir, engine="abacus")


def test_both_ways_write_the_same(quantized: dict[str, Path]) -> None:
    texts = {}
    for engine in generate.ENGINES:
        found = septet_json("run", quantized["trellis"], PROMPT, "--max-new-tokens", 12, "--engine", engine)
        texts[engine] = found["completion"]
    assert texts["native"] == texts["transformers"] == texts["auto"] != ""
    drawn = [septet("run", quantized["split"], PROMPT, "--temperature", 1, "--engine", engine).stdout for engine in generate.ENGINES]
    assert drawn[0] == drawn[1]


def test_the_way_round_says_why(quantized: dict[str, Path], tiny_model_dir: Path, tmp_path: Path) -> None:
    result = septet_process("run", tiny_model_dir, PROMPT, "--max-new-tokens", 2)
    assert result.returncode == 0 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("note: running through transformers: ")
    assert septet_process("run", quantized["trellis"], PROMPT, "--max-new-tokens", 2).stderr == ""
    copy = Path(shutil.copytree(quantized["trellis"], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256}
    (copy / "config.json").write_text(json.dumps(config))
    assert "rope_type must be default, linear or llama3, got yarn" in septet("run", copy, PROMPT).stderr
    assert_error(septet("run", copy, PROMPT, "--engine", "native"), "rope_type")


def test_chat_and_options_in_the_engine(quantized: dict[str, Path]) -> None:
    options = ["--temperature", 1.5, "--min-p", 0.01, "--repetition-penalty", 1.3, "--seed", 3, "--max-new-tokens", 8, "--engine", "native"]
    first = septet("chat", quantized["trellis"], *options, input="Hello\nAnd then?\n")
    assert first.exit_code == 0, first.stderr
    assert first.stdout == septet("chat", quantized["trellis"], *options, input="Hello\nAnd then?\n").stdout
    assert first.stdout.startswith(septet("chat", quantized["trellis"], "Hello", *options).stdout)


# ---- broken and odd checkpoints ----


def rewrite(directory: Path, **changes: object) -> None:
    """Change entries of config.json."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 0},
        {"num_attention_heads": "4"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": None},
        *({"head_dim": 15}, {"head_dim": 258}, {"intermediate_size": 1 << 17}),
        {"hidden_act": "gelu"},
        {"model_type": "mamba"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}},
        {"rms_norm_eps": "small"},
        {"partial_rotary_factor": 0.5},
        {"max_position_embeddings": 0},
    ],
)
def test_shapes_the_engine_does_not_know(broken: Path, changes: dict) -> None:
    rewrite(broken, **changes)
    with pytest.raises(UnsupportedModelError) as caught:
        Engine.load(broken)
    assert caught.value.requirement.startswith("for the native engine, ") and caught.value.hint


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 8}, (0, 0)),
        ({"model_type": "mistral"}, (4096, 4096)),
        ({"model_type": "qwen2", "sliding_window": 8}, (0, 0)),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "layer_types": engine_models.WINDOW_TYPES}, (0, 8)),
    ],
)
def test_windows_are_those_of_transformers(config: dict, windows: tuple[int, ...]) -> None:
    assert _windows(config, config["model_type"], 2) == windows


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"intermediate_size": 256}, ValueError, "sizes must fit"),
        ({"vocab_size": 300}, ValueError, "sizes must fit"),
        ({"num_key_value_heads": 3}, ValueError, "sizes must fit"),
        ({"num_hidden_layers": 3}, CheckpointError, "model.layers.2.* no such tensor"),
        ({"num_hidden_layers": 1}, UnsupportedModelError, "every tensor must have its place"),
        ({"tie_word_embeddings": False}, CheckpointError, "lm_head"),
        ({"model_type": "qwen3"}, CheckpointError, "q_norm"),
    ],
)
def test_configs_that_contradict_their_tensors(broken: Path, changes: dict, error: type, words: str) -> None:
    rewrite(broken, **changes)
    with pytest.raises(error, match=words) as caught:
        Engine.load(broken)
    assert caught.value.requirement and caught.value.hint


def test_every_tensor_is_checked(broken: Path) -> None:
    shard = broken / "model.safetensors"
    data = shard.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in np.linspace(header, len(data) - 1, 25).astype(int):
        changed = bytearray(data)
        changed[place] ^= 4
        shard.write_bytes(changed)
        with pytest.raises(CheckpointError, match="must have the CRC"):
            Engine.load(broken)
