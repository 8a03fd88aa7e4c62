"""The decode kernel on a real GPU, beside transformers on the same packed model; test_gpu_engine.py tests what needs no GPU."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="needs the extra septet[hf]; make test installs it")
pytest.importorskip("transformers", reason="needs the extra septet[hf]; make test installs it")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU and a torch built for it; test_gpu_engine.py tests what can be tested without", allow_module_level=True)

from packed_models import FAMILIES, packed_model  # noqa: E402
from septet import generate  # noqa: E402
from septet.engine.sampling import Sampling  # noqa: E402
from septet.errors import UnsupportedModelError  # noqa: E402
from septet.gpu_engine import GpuEngine  # noqa: E402

PROMPT = [5, 17, 200, 3, 42, 9, 77]
#: Of the logits' norm: a float rounding of another order turns an int8 input by one now and then; 16-bit models round everywhere.
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 3e-2}


def logits_of(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """The logits after every token, by transformers in float32."""
    with torch.inference_mode():
        return model(torch.tensor([tokens], device="cuda"), use_cache=False).logits[0].float()


def steps(engine: GpuEngine, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """The logits after each of `tokens`, one step at a time."""
    engine.next_logits(prompt)
    rows = []
    for token in tokens:
        engine.give(token)
        rows.append(engine.logits.clone())
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, dtype) -> None:
    model, text = packed_model(family).cuda(), [int(token) for token in torch.randint(0, 256, (60,))]
    wanted = logits_of(model, PROMPT + text)[len(PROMPT) :]
    ours = steps(GpuEngine(model.to(dtype)), PROMPT, text)
    errors = (ours - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert float(errors.max()) <= BOUNDS[dtype]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_launch_has_the_bits_of_a_launch_per_step(family) -> None:
    model = packed_model(family).cuda().to(torch.bfloat16)
    kernel = GpuEngine(model).kernel
    embedded = torch.randn(1, 1, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    for position in (0, 1, 40, 300, 500):
        results = []
        for stepwise in (False, True, False):
            kernel.cache.copy_(torch.sin(torch.arange(kernel.cache.numel(), device="cuda")).view_as(kernel.cache))
            kernel.position.fill_(position)
            results.append((kernel.run(embedded, stepwise), kernel.cache.clone()))
            assert int(kernel.position) == position + 1
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


def test_a_long_text_is_that_of_transformers() -> None:
    model, text = packed_model("llama").cuda(), [int(token) for token in torch.randint(0, 256, (1500,))]
    wanted = logits_of(model, text)[1400:]
    ours = steps(GpuEngine(model, 1536), text[:1400], text[1400:])
    assert float(((ours - wanted).norm(dim=1) / wanted.norm(dim=1)).max()) <= BOUNDS[torch.float32]


def test_float_activations_go_through_transformers() -> None:
    model = packed_model("llama").cuda()
    model.model.layers[0].mlp.up_proj.activations = "float"
    with pytest.raises(UnsupportedModelError, match="int8"):
        GpuEngine(model)
