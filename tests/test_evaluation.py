"""Evaluation against a direct computation: windows, perplexity and its error, divergence, bits per weight."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from septet.errors import CheckpointError, OptionError, UnsupportedModelError
from septet.evaluation import cut_windows, evaluate, score_models
from septet.evaluation.divergence import divergence
from septet.evaluation.perplexity import mean_with_error, perplexity, token_nll
from septet.loading import load_model, load_tokenizer
from tolerances import FLOAT32_DIFFERENCE, FLOAT32_MEAN, SPREAD_OF_400

TEXT = "Two neighbouring weights share seven bits, and no bit is idle. " * 12
CONTEXT = 64


@pytest.fixture(scope="module")
def other_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """The tiny model with its weights moved a little."""
    path = tmp_path_factory.mktemp("other") / "model"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(path)
    return path


def direct(directory: Path, tokens: torch.Tensor) -> np.ndarray:
    """Log-probabilities in float64 at every position of every window, from the whole model at once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=tokens).logits, -1).numpy()


@pytest.mark.parametrize("score", ["half", "all"])
def test_figures_are_those_of_a_direct_computation(tiny_model_dir: Path, other_model_dir: Path, score: str) -> None:
    result = evaluate(other_model_dir, TEXT, tiny_model_dir, CONTEXT, score)
    tokens = cut_windows(load_tokenizer(tiny_model_dir), TEXT, CONTEXT, score).tokens
    p, q = direct(tiny_model_dir, tokens), direct(other_model_dir, tokens)
    first = CONTEXT // 2 if score == "half" else 0
    p, q, targets = p[:, first:-1], q[:, first:-1], tokens[:, first + 1 :].numpy()[..., None]
    nll = -np.take_along_axis(q, targets, -1)[..., 0].mean(1)
    error = nll.std(ddof=1) / math.sqrt(len(nll))
    kl = (np.exp(p) * (p - q)).sum(-1)
    assert result.windows == len(TEXT) // CONTEXT
    assert result.tokens == kl.size
    assert result.perplexity == pytest.approx(math.exp(nll.mean()), rel=FLOAT32_MEAN)
    assert result.perplexity_stderr == pytest.approx(math.exp(nll.mean()) * error, rel=FLOAT32_DIFFERENCE)
    assert result.reference_perplexity == pytest.approx(math.exp(-np.take_along_axis(p, targets, -1).mean()), rel=FLOAT32_MEAN)
    assert result.kld_mean == pytest.approx(kl.mean(), rel=FLOAT32_DIFFERENCE)
    assert result.kld_stderr == pytest.approx(kl.mean(1).std(ddof=1) / math.sqrt(len(kl)), rel=FLOAT32_DIFFERENCE)
    assert result.kld_p99 == pytest.approx(np.quantile(kl, 0.99), rel=FLOAT32_DIFFERENCE)
    assert result.top1_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean())


def test_a_model_agrees_with_itself_exactly(tiny_model_dir: Path) -> None:
    result = evaluate(tiny_model_dir, TEXT, tiny_model_dir, CONTEXT)
    assert (result.kld_mean, result.kld_stderr, result.kld_p99, result.top1_agreement) == (0.0, 0.0, 0.0, 1.0)
    assert result.reference_perplexity == result.perplexity


def test_without_a_reference_there_is_no_divergence(tiny_model_dir: Path) -> None:
    calls: list[tuple[int, int]] = []
    result = evaluate(tiny_model_dir, TEXT, context=CONTEXT, progress=lambda done, total: calls.append((done, total)))
    assert result.kld_mean is None and result.top1_agreement is None and result.reference_perplexity is None
    assert calls == [(done, result.windows) for done in range(1, result.windows + 1)]
    assert json.loads(json.dumps(result.as_dict()))["compute"] == "float32"


def test_figures_do_not_depend_on_windows_at_work(tiny_model_dir: Path, other_model_dir: Path) -> None:
    windows = cut_windows(load_tokenizer(tiny_model_dir), TEXT, CONTEXT, "half")
    models = load_model(other_model_dir, torch.float32), load_model(tiny_model_dir, torch.float32)
    before = torch.get_num_threads()
    try:
        figures = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            figures.append(score_models(models[0], windows, models[1]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert figures[0] == figures[1]


def test_the_head_sees_scored_positions_only(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(tiny_model_dir, torch.float32)
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    score_models(model, cut_windows(load_tokenizer(tiny_model_dir), TEXT, CONTEXT, "half"))
    assert set(seen) == {CONTEXT // 2}


class Characters:
    """A tokenizer whose tokens are code points; with `bos` it starts every text with token 1."""

    def __init__(self, bos: bool, knows_bos: bool = True) -> None:
        self.bos_token_id = 1 if knows_bos else None
        self._starts = bos

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict:
        ids = [ord(character) for character in text]
        return {"input_ids": [1, *ids] if add_special_tokens and self._starts else ids}


def test_windows_follow_the_rule_of_llama_cpp() -> None:
    text = "".join(chr(100 + index) for index in range(27))
    plain = cut_windows(Characters(bos=False), text, 8, "half")
    assert plain.tokens.tolist() == [[100 + 8 * row + column for column in range(8)] for row in range(3)]
    assert (plain.first, plain.scored, plain.starts_with_bos) == (4, 3, False)
    # With BOS the text is one token longer, and the first token of every window gives way to BOS.
    marked = cut_windows(Characters(bos=True), text, 8, "half")
    assert marked.tokens[:, 0].tolist() == [1, 1, 1]
    assert marked.tokens[1, 1:].tolist() == [108, 109, 110, 111, 112, 113, 114]
    assert marked.starts_with_bos
    assert cut_windows(Characters(bos=False, knows_bos=False), text, 8, "all").scored == 7
    assert cut_windows(Characters(bos=False), "x" * 1024, 512, "half").scored == 255


@pytest.mark.parametrize(
    ("text", "context", "score", "message"),
    [
        ("x" * 15, 8, "half", "fill at least 2 windows of 8 tokens, got 15 tokens"),
        ("x" * 99, 3, "half", "at least 4 tokens, got 3"),
        ("x" * 99, 8, "most", "half or all, got most"),
    ],
)
def test_windows_refuse(text: str, context: int, score: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cut_windows(Characters(bos=False), text, context, score)


def test_standard_error_by_the_delta_method() -> None:
    assert mean_with_error([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1 / math.sqrt(3)))
    assert perplexity([1.0, 2.0, 3.0]) == pytest.approx((math.exp(2), math.exp(2) / math.sqrt(3)))
    assert perplexity([900.0, 900.0]) == (math.inf, math.inf)


def test_standard_error_covers_what_repeats_show() -> None:
    generator = np.random.default_rng(5)
    trials = [perplexity(generator.normal(3, 0.2, 40).tolist()) for _ in range(400)]
    spread = np.std([value for value, _ in trials])
    assert np.mean([error for _, error in trials]) == pytest.approx(spread, rel=SPREAD_OF_400)


def test_nll_and_divergence_at_extremes() -> None:
    logits = torch.tensor([[0.0, 200.0, -200.0], [1.0, 1.0, 1.0]])
    assert token_nll(logits, torch.tensor([2, 0])).tolist() == pytest.approx([400.0, math.log(3)])
    kl, same = divergence(logits, logits.roll(1, -1))
    assert kl[0].item() == pytest.approx(200.0)
    assert kl[1].item() == 0 and same.tolist() == [False, True]


def test_divergence_is_the_same_in_pieces() -> None:
    generator = torch.Generator().manual_seed(3)
    p, q = torch.randn(150, 33, generator=generator), torch.randn(150, 33, generator=generator)
    whole = torch.nn.functional.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(divergence(p, q)[0], whole)


def test_bits_of_an_unquantized_model(tiny_model_dir: Path) -> None:
    result = evaluate(tiny_model_dir, TEXT, context=CONTEXT)
    assert result.effective_bits == 32.0
    assert result.effective_bits_total == 32.0


def test_vocabularies_must_match(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="share one vocabulary, got 300 and 260"):
        evaluate(tmp_path, TEXT, tiny_model_dir, CONTEXT)


def test_context_must_fit_the_model(tiny_model_dir: Path) -> None:
    with pytest.raises(OptionError, match="at most 1024 tokens"):
        evaluate(tiny_model_dir, TEXT * 4, context=1025)


def test_activations_belong_to_septet_directories(tiny_model_dir: Path) -> None:
    with pytest.raises(OptionError, match="septet directories only"):
        evaluate(tiny_model_dir, TEXT, context=CONTEXT, activations="float")
    with pytest.raises(OptionError, match="int8 or float, got int4"):
        evaluate(tiny_model_dir, TEXT, context=CONTEXT, activations="int4")


def test_a_path_must_be_a_model(tmp_path: Path, tiny_model_dir: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a model")
    with pytest.raises(UnsupportedModelError, match="a Hugging Face directory or a .gguf file"):
        evaluate(file, TEXT, context=CONTEXT)
    (tmp_path / "model.gguf").write_bytes(b"GGML....")
    with pytest.raises(CheckpointError, match="must start with GGUF"):
        evaluate(tmp_path / "model.gguf", TEXT, context=CONTEXT)
