"""The decode kernel on a real GPU, beside transformers on the same packed model; test_gpu_engine.py tests what needs no GPU."""

from __future__ import annotations

import pytest
import torch

from needs import needs, skip_module_without

skip_module_without("cuda", "test_gpu_engine.py tests what can be tested without")

from packed_models import FAMILIES, packed_model  # noqa: E402
from septet import generate  # noqa: E402
from septet.engine.sampling import Sampling  # noqa: E402
from septet.errors import OptionError, UnsupportedModelError  # noqa: E402
from septet.gpu_engine import GpuEngine  # noqa: E402

PROMPT = [5, 17, 200, 3, 42, 9, 77]
#: Of the logits' norm. Half of the steps must be within the first bound (measured: 4e-7); in the others a float rounding of another order
#: turns an int8 input by one, which these random models amplify up to the second (measured: 2.1e-2).
HALF_BOUND, BOUND = 1e-6, 3e-2


def errors(ours: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each row, relative to its norm."""
    return (ours - wanted).norm(dim=1) / wanted.norm(dim=1)


def logits_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The logits after every token, by transformers."""
    with torch.inference_mode():
        return model(torch.tensor([tokens], device="cuda"), use_cache=False).logits[0].float()


def single_steps(model: torch.nn.Module, tokens: list[int], positions: range) -> torch.Tensor:
    """The logits after each of some tokens, behind keys and values of transformers: a turned input stays where it is."""
    engine, rows = GpuEngine(model, len(tokens) + 1), []
    engine.next_logits(tokens)
    keys_and_values = engine.kernel.cache.clone()
    for position in positions:
        with torch.inference_mode():
            engine.kernel.cache.copy_(keys_and_values)
            # the step has to make these itself
            engine.kernel.cache[..., position:, :] = float("nan")
            engine.kernel.position.move_to(position)
        engine.give(tokens[position])
        rows.append(engine.logits.clone())
    return torch.stack(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family) -> None:
    model, tokens = packed_model(family).cuda(), PROMPT + [int(token) for token in torch.randint(0, 256, (60,))]
    found = errors(single_steps(model, tokens, range(1, len(tokens))), logits_of(model, tokens)[1:])
    assert float(found.median()) <= HALF_BOUND and float(found.max()) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_it_is_closer_to_float32_than_transformers(family) -> None:
    model, tokens = packed_model(family).cuda(), PROMPT + [int(token) for token in torch.randint(0, 256, (60,))]
    # bfloat16 has fewer numbers, so both begin with weights that it has
    model = model.to(torch.bfloat16)
    wanted = logits_of(model.float(), tokens)[1:]
    model = model.to(torch.bfloat16)
    ours, theirs = (errors(rows, wanted) for rows in (single_steps(model, tokens, range(1, len(tokens))), logits_of(model, tokens)[1:]))
    assert float(ours.median()) <= float(theirs.median())


def test_a_long_text_is_that_of_transformers() -> None:
    model, tokens = packed_model("llama").cuda(), [int(token) for token in torch.randint(0, 256, (1500,))]
    found = errors(single_steps(model, tokens, range(1400, 1500)), logits_of(model, tokens)[1400:])
    assert float(found.median()) <= HALF_BOUND and float(found.max()) <= BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_one_launch_has_the_bits_of_a_launch_per_step(family) -> None:
    model = packed_model(family).cuda().to(torch.bfloat16)
    kernel = GpuEngine(model).kernel
    embedded = torch.randn(1, 1, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    for position in (0, 1, 40, 300, 500):
        results = []
        for stepwise in (False, True, False):
            with torch.inference_mode():
                kernel.cache.copy_(torch.sin(torch.arange(kernel.cache.numel(), device="cuda")).view_as(kernel.cache))
                kernel.position.move_to(position)
                results.append((kernel.run(embedded, stepwise), kernel.cache.clone()))
            assert int(kernel.position.on_device) == kernel.position.on_host == position + 1
        assert results[0][0].isfinite().all()
        for normalized, cache in results[1:]:
            assert torch.equal(normalized, results[0][0]) and torch.equal(cache, results[0][1])


@pytest.mark.parametrize("sampling", [Sampling(40), Sampling(30, temperature=0.8, seed=3)])
def test_text_is_that_of_transformers(sampling) -> None:
    model = packed_model("llama").cuda()
    wanted = list(generate.generate_tokens(model, PROMPT, sampling))
    engine = GpuEngine(model, length=16)
    for _ in range(2):
        assert list(generate.generate_tokens(engine, PROMPT, sampling)) == wanted


def test_a_full_cache_is_refused_and_the_device_works_on() -> None:
    model = packed_model("llama").cuda()
    engine, last = GpuEngine(model, length=len(PROMPT) + 2), len(PROMPT) + 1
    engine.next_logits(PROMPT)
    engine.give(5)
    engine.step()
    logits = engine.logits.clone()
    for refused in (engine.step, lambda: engine.give(5), lambda: engine.kernel.run(torch.zeros(1, 1, 512, device="cuda"))):
        with pytest.raises(OptionError, match=f"cache's {last + 1} places, got token {last + 2}"):
            refused()
    assert torch.equal(engine.logits, logits) and int(engine.kernel.position.on_device) == last + 1
    engine.next_logits(PROMPT)
    engine.give(5)
    engine.step()
    assert torch.equal(engine.logits, logits)


@needs("two-gpus", "all others run on one")
def test_the_second_gpu_writes_the_text_of_the_first() -> None:
    texts = [
        list(generate.generate_tokens(GpuEngine(packed_model("llama").to(device)), PROMPT, Sampling(40))) for device in ("cuda:0", "cuda:1")
    ]
    assert texts[0] == texts[1]


def test_float_activations_go_through_transformers() -> None:
    model = packed_model("llama").cuda()
    model.model.layers[0].mlp.up_proj.activations = "float"
    with pytest.raises(UnsupportedModelError, match="int8"):
        GpuEngine(model)
