"""The native engine: logits of transformers within a bound, and the same bits however a text is cut, computed or begun."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import engine_models
import tolerances
from native_cases import SETS, native
from septet.engine import Engine, Sampling
from septet.engine.engine import CACHES
from septet.errors import OptionError
from septet.loading import load_model

CODES = {
    "trellis": {},
    "split": {"code": "split", "symmetric": True},
    "asymmetric": {"code": "split", "symmetric": False, "granularity": "group", "group_size": 32},
}
HEADS = {"int8": {}, "trellis": {"head": "trellis"}, "keep": {"head": "keep"}}


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Longer than a page of the cache, than a chunk of the forward pass, and than every window."""
    return np.random.default_rng(5).integers(0, engine_models.VOCABULARY, 300).tolist()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized Llama of two layers."""
    return engine_models.quantized("llama", tmp_path_factory.mktemp("llama"))


def deviation(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, relative to the spread of the logits."""
    assert found.shape == wanted.shape and found.dtype == np.float32
    return float(np.abs(found - wanted).max() / wanted.std())


# ---- against transformers ----


@pytest.mark.parametrize("family", engine_models.FAMILIES)
def test_logits_are_those_of_the_dequantized_weights(family: str, tmp_path: Path, text: list[int]) -> None:
    directory = engine_models.quantized(family, tmp_path)
    wanted = engine_models.logits(engine_models.dense(directory), text)
    assert deviation(Engine.load(directory, "float", "float32").logits(text), wanted) < tolerances.ENGINE_FLOAT
    assert deviation(Engine.load(directory, "float").logits(text), wanted) < tolerances.ENGINE_FLOAT16_CACHE
    coarse = Engine.load(directory, "float", "int8").logits(text)
    assert (coarse - wanted).std() < tolerances.ENGINE_INT8_CACHE * wanted.std()
    rounded = Engine.load(directory, "int8").logits(text)
    assert (rounded - wanted).std() < tolerances.ENGINE_INT8 * wanted.std()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_every_layer_adds_what_it_should(layers: int, tmp_path: Path, text: list[int]) -> None:
    directory = engine_models.quantized("qwen3", tmp_path, layers)
    wanted = engine_models.logits(engine_models.dense(directory), text)
    assert deviation(Engine.load(directory, "float", "float32").logits(text), wanted) < tolerances.ENGINE_FLOAT * layers / 2 + 1e-6


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("family", ["llama", "llama-odd"])
def test_every_code_and_head(family: str, code: str, head: str, tmp_path: Path, text: list[int]) -> None:
    directory = engine_models.quantized(family, tmp_path, **CODES[code], **HEADS[head])
    wanted = engine_models.logits(engine_models.dense(directory), text)
    assert deviation(Engine.load(directory, "float", "float32").logits(text), wanted) < tolerances.ENGINE_FLOAT


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dense_weights_of_two_bytes(dtype: str, tmp_path: Path, text: list[int]) -> None:
    torch = engine_models.torch
    source = engine_models.save("llama", tmp_path / "wide")
    load_model(source, getattr(torch, dtype)).save_pretrained(tmp_path / "dense")
    directory = engine_models.pack(tmp_path / "dense", tmp_path / "packed", head="keep")
    wanted = engine_models.logits(engine_models.dense(directory), text)
    assert deviation(Engine.load(directory, "float", "float32").logits(text), wanted) < tolerances.ENGINE_FLOAT


def test_int8_activations_cost_what_they_cost_in_transformers(llama: Path, text: list[int]) -> None:
    wanted = engine_models.logits(engine_models.dense(llama), text)
    theirs = engine_models.logits(load_model(llama, engine_models.torch.float32, "int8"), text)
    ours = Engine.load(llama, "int8", "float32").logits(text)
    assert (ours - wanted).std() < 1.1 * (theirs - wanted).std()


def test_greedy_text_is_that_of_transformers(llama: Path) -> None:
    prompt, bound = [3, 1, 4, 1, 5], tolerances.ENGINE_FLOAT
    engine = Engine.load(llama, "float", "float32")
    ours = list(engine.generate(prompt, Sampling(200)))
    wanted = engine_models.logits(engine_models.dense(llama), prompt + ours)[len(prompt) - 1 : -1]
    ranked = np.sort(wanted, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 2 * bound * wanted.std()
    first_unclear = len(clear) if clear.all() else int(clear.argmin())
    assert first_unclear > 100
    assert ours[:first_unclear] == wanted.argmax(axis=1)[:first_unclear].tolist()


# ---- the same bits ----


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("cache", CACHES)
def test_no_way_to_cut_a_text_changes_a_bit(llama: Path, text: list[int], activations: str, cache: str) -> None:
    engine = Engine.load(llama, activations, cache)
    whole = engine.logits(text)
    for size in (1, 7, 100):
        engine.reset()
        ids = np.asarray(text, np.int32)
        parts = [engine._append(ids[start : start + size], len(ids[start : start + size])) for start in range(0, len(text), size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("head", ["trellis", "keep"])
def test_where_outputs_are_finished_changes_no_bit(head: str, tmp_path: Path, text: list[int]) -> None:
    """Of a single token where they were made, of several later."""
    directory = engine_models.quantized("llama-wide", tmp_path, 1, **HEADS[head])
    whole = Engine.load(directory, threads=1).logits(text[:24])
    for threads in (1, 2):
        engine = Engine.load(directory, threads=threads)
        parts = [engine._append(np.asarray([token], np.int32), 1) for token in text[:24]]
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_threads_change_no_bit(llama: Path, text: list[int], activations: str) -> None:
    results = [Engine.load(llama, activations, threads=threads).logits(text) for threads in (1, 2, 5)]
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


@pytest.mark.parametrize("family", ["llama-bias", "llama-odd", "qwen3"])
@pytest.mark.parametrize("head", ["int8", "keep"])
def test_instruction_sets_change_no_bit(family: str, head: str, tmp_path: Path, text: list[int]) -> None:
    directory = engine_models.quantized(family, tmp_path, head=head)
    results = []
    for name in SETS:
        native.set_instruction_set(name)
        results.append([Engine.load(directory, "int8", cache).logits(text) for cache in CACHES])
    native.set_instruction_set(None)
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def test_a_text_goes_on_where_the_last_one_parted(llama: Path, text: list[int]) -> None:
    engine, fresh = Engine.load(llama), Engine.load(llama)
    for prompt in (text[:50], text[:80], text[:30] + [7, 8], text[:30], text[:30], text):
        fresh.reset()
        np.testing.assert_array_equal(engine.next_logits(prompt), fresh.next_logits(prompt))
        np.testing.assert_array_equal(engine.next_logits(prompt), fresh.logits(prompt)[-1])


@pytest.mark.parametrize(("cache", "bytes_per_vector"), [("float32", 64), ("float16", 32), ("int8", 20)])
def test_memory_grows_with_the_text(llama: Path, cache: str, bytes_per_vector: int) -> None:
    engine = Engine.load(llama, cache=cache)
    assert engine.memory_bytes["cache"] == 0 < engine.memory_bytes["weights"]
    engine.next_logits([1] * 257)
    pages, layers, heads = 2, 2, 2
    assert engine.memory_bytes["cache"] == pages * 256 * layers * heads * 2 * bytes_per_vector
    engine.next_logits([1], text=3)
    assert engine.memory_bytes["cache"] == (pages + 1) * 256 * layers * heads * 2 * bytes_per_vector
    engine.reset()
    assert engine.memory_bytes["cache"] == 0


class Interrupted:
    """A native engine whose call number `at` is interrupted the moment it returns, where Ctrl-C is noticed."""

    def __init__(self, native_engine: object, at: int) -> None:
        self._engine, self._left = native_engine, at

    def __getattr__(self, name: str) -> object:
        def call(*arguments: object) -> object:
            result = getattr(self._engine, name)(*arguments)
            self._left -= 1
            if self._left == 0:
                raise KeyboardInterrupt
            return result

        return call


def test_an_interrupted_call_leaves_the_texts_whole(llama: Path, text: list[int]) -> None:
    wanted = Engine.load(llama).next_logits(text[:9])
    at, finished = 0, False
    while not finished:
        at += 1
        engine = Engine.load(llama)
        engine.next_logits(text[:5]), engine.next_logits(text[:7], 1)
        whole, engine._native = engine._native, Interrupted(engine._native, at)
        try:
            engine.step({0: text[5], 1: text[7]})
            engine.next_logits([*text[:4], 7, 7])
            engine.reset()
            finished = True
        except KeyboardInterrupt:
            pass
        engine._native = whole
        for number in (0, 1):
            np.testing.assert_array_equal(engine.next_logits(text[:9], number), wanted)
    assert at > 4


def test_an_interrupted_step_can_be_taken_again(llama: Path, text: list[int]) -> None:
    engine, fresh = Engine.load(llama), Engine.load(llama)
    fresh.next_logits(text[:5]), engine.next_logits(text[:5])
    whole, engine._native = engine._native, Interrupted(engine._native, 2)
    with pytest.raises(KeyboardInterrupt):
        engine.step({0: 7})
    engine._native = whole
    np.testing.assert_array_equal(engine.step({0: 7}), fresh.step({0: 7}))


def test_callers_in_several_threads_wait_for_each_other(llama: Path, text: list[int]) -> None:
    engine = Engine.load(llama, threads=1)
    prompts = [text[:4] + text[start : start + 3] for start in range(8, 108)]
    wanted = [engine.next_logits(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(engine.next_logits, prompts))
    np.testing.assert_array_equal(found, wanted)


# ---- several texts ----


def test_texts_beside_each_other_change_no_bit(llama: Path, text: list[int]) -> None:
    engine, alone = Engine.load(llama, threads=2), Engine.load(llama)
    prompts = {0: text[:5], 1: text[7:8], 2: text[:260], 5: text[100:130]}
    for number, prompt in prompts.items():
        np.testing.assert_array_equal(engine.next_logits(prompt, number), alone.next_logits(prompt))
    for step in range(3):
        tokens = {number: text[50 + 7 * step + number] for number in (5, 0, 2, 1)[step:]}
        rows = engine.step(tokens)
        for row, (number, token) in zip(rows, tokens.items()):
            prompts[number] = [*prompts[number], token]
            np.testing.assert_array_equal(row, alone.next_logits(prompts[number]))


def test_a_batch_is_its_prompts_one_by_one(llama: Path, text: list[int]) -> None:
    engine = Engine.load(llama, context=60)
    prompts = [text[:50], text[3:4], text[9:20]]
    for sampling in (Sampling(30), Sampling(30, temperature=1.5, top_k=50, seed=3, repetition_penalty=1.1)):
        wanted = [list(engine.generate(prompt, sampling)) for prompt in prompts]
        stop = frozenset(wanted[2][5:6])
        assert engine.generate_batch(prompts, sampling) == wanted and len(wanted[0]) == 10
        assert engine.generate_batch(prompts, sampling, stop) == [list(engine.generate(prompt, sampling, stop)) for prompt in prompts]
    assert engine.generate_batch([]) == []


# ---- limits ----


def test_what_an_engine_refuses(llama: Path) -> None:
    engine = Engine.load(llama, context=20)
    before = engine.next_logits([1, 2, 3])
    refused = {"at least one": [[]], "vocabulary": [[1, 203], [-1], [2**40]], "context": [[1] * 21]}
    for words, tokens in ((words, tokens) for words, texts in refused.items() for tokens in texts):
        with pytest.raises(OptionError, match=words) as caught:
            engine.next_logits(tokens)
        assert caught.value.requirement and caught.value.hint
    np.testing.assert_array_equal(engine.next_logits([1, 2, 3]), before)
    with pytest.raises(OptionError, match="shorter than the model's 20 positions"):
        next(engine.generate([1] * 20))
    with pytest.raises(OptionError, match="whole numbers"):
        engine.next_logits([0.5])
    assert len(list(engine.generate([1] * 17, Sampling(100)))) == 3
    with pytest.raises(OptionError, match="shorter than the model's 20 positions"):
        engine.generate_batch([[1], [1] * 20])
    with pytest.raises(OptionError, match="a text must be in"):
        engine.next_logits([1], text=4096)
    for tokens in ({3: 1}, {-1: 1}):
        with pytest.raises(OptionError, match="begin with a prompt"):
            engine.step(tokens)


def test_arguments(llama: Path) -> None:
    for options in ({"activations": "int4"}, {"cache": "int2"}, {"context": 0}, {"context": 641}):
        with pytest.raises(OptionError, match=next(iter(options))):
            Engine.load(llama, **options)


def test_the_engine_needs_no_torch(llama: Path) -> None:
    code = (
        "import sys; from septet.engine import Engine, Sampling; e = Engine.load(sys.argv[1]); "
        "list(e.generate([1, 2], Sampling(3, temperature=1.0))); print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(llama)], text=True).strip() == "[]"
