"""Generation: equal to transformers' own greedy search, whole characters when streaming, seeded draws, and where it stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from septet import generate
from septet.engine.tokenizer import Pieces
from septet.errors import CheckpointError, OptionError
from septet.generate import Sampling

PROMPT = "Seven bits"


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> tuple:
    return generate.load(tiny_model_dir, engine="transformers")


def test_greedy_is_what_transformers_writes(loaded: tuple) -> None:
    model, tokenizer = loaded
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    ours = list(generate.generate_tokens(model, prompt["input_ids"][0].tolist(), Sampling(24)))
    assert ours == [token for token in expected if token != tokenizer.eos_token_id]


def test_streamed_pieces_are_the_text(loaded: tuple) -> None:
    pieces: list[str] = []
    done = generate.complete(*loaded, PROMPT, Sampling(40, temperature=1.5, seed=4), on_text=pieces.append)
    assert "".join(pieces) == done.text
    assert done.prompt_tokens == len(PROMPT) and 0 < done.tokens <= 40
    assert done.prompt_seconds > 0 and done.tokens_per_second > 0


def test_characters_wait_for_all_their_bytes(loaded: tuple) -> None:
    _, tokenizer = loaded
    pieces = Pieces(tokenizer.decode)
    shown = [pieces.add(token) for token in tokenizer("a√b")["input_ids"]]
    assert shown == ["a", "", "", "√", "b"]
    assert pieces.add(tokenizer("√")["input_ids"][0]) == ""
    assert pieces.finish() == "\ufffd"
    assert pieces.text == "a√b\ufffd"


def test_draws_leave_the_global_generator_alone(loaded: tuple) -> None:
    model, tokenizer = loaded
    prompt, sampling = tokenizer(PROMPT)["input_ids"], Sampling(12, temperature=1.0, top_k=20, top_p=0.9, seed=3)
    state = torch.get_rng_state()
    first = list(generate.generate_tokens(model, prompt, sampling))
    assert first == list(generate.generate_tokens(model, prompt, sampling))
    assert torch.equal(state, torch.get_rng_state())


def test_generation_stops(loaded: tuple) -> None:
    model, tokenizer = loaded
    prompt = tokenizer(PROMPT)["input_ids"]
    tokens = list(generate.generate_tokens(model, prompt, Sampling(12)))
    assert list(generate.generate_tokens(model, prompt, Sampling(12), frozenset(tokens[:1]))) == []
    assert len(list(generate.generate_tokens(model, [7] * 1021, Sampling(12)))) == 3
    with pytest.raises(OptionError, match="1024 positions, got 1024 tokens"):
        next(generate.generate_tokens(model, [7] * 1024, Sampling(12)))
    with pytest.raises(OptionError, match="at least one token"):
        next(generate.generate_tokens(model, [], Sampling(12)))


def test_speed_is_measured(loaded: tuple) -> None:
    assert generate.measure_speed(loaded[0], [1, 2, 3], 4) > 0


def test_chat_prompt(loaded: tuple) -> None:
    _, tokenizer = loaded
    tokens = generate.chat_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokens == tokenizer.convert_tokens_to_ids(["<user>", "H", "i"])
    tokenizer.chat_template, template = None, tokenizer.chat_template
    try:
        with pytest.raises(CheckpointError, match="chat template"):
            generate.chat_prompt(tokenizer, [])
    finally:
        tokenizer.chat_template = template
