"""Calibration: Hessians are those of the inputs behind the quantized prefix, whatever the threads; a model can write its own text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra septet[hf]; make test installs it")
transformers = pytest.importorskip("transformers", reason="needs the extra septet[hf]; make test installs it")

from septet.calibration import Calibrator, sample_windows  # noqa: E402
from septet.checkpoint import QuantizeOptions  # noqa: E402
from septet.errors import OptionError, UnsupportedModelError  # noqa: E402
from septet.loading import load_model  # noqa: E402
from septet.model import LayerPlan, plan  # noqa: E402
from septet.quantize import QuantizedTensor, dequantize, quantize_trellis  # noqa: E402

START = 256


def windows(count: int = 3, context: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, context), generator=torch.Generator().manual_seed(1))


def load(path: Path) -> torch.nn.Module:
    return load_model(path, dtype="float32")


def groups_of(layers: list[LayerPlan]) -> list[list[LayerPlan]]:
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return list(groups.values())


def quantized(model: torch.nn.Module, group: list[LayerPlan], hessian: np.ndarray | None) -> list[QuantizedTensor]:
    weights = [model.get_submodule(layer.name).weight.detach().numpy() for layer in group]
    weights = [np.ascontiguousarray(weight.T) if layer.kind == "conv1d" else weight for layer, weight in zip(group, weights)]
    return quantize_trellis(weights, [layer.name for layer in group], 7, hessian=hessian)


def run_through(load_it: Callable[[], torch.nn.Module], threads: int = 1) -> tuple[dict[str, np.ndarray], dict[str, QuantizedTensor]]:
    """Calibrate and quantize every layer: Hessians by group, results by layer."""
    model, source = load_it(), load_it()
    layers = plan(source, QuantizeOptions(head="keep"))
    calibrator, hessians, made = Calibrator(model, layers, windows(), threads), {}, {}
    for group in groups_of(layers):
        hessian = hessians[group[0].group] = calibrator.hessian(group)
        for layer, result in zip(group, quantized(source, group, hessian)):
            made[layer.name] = result
            calibrator.take_over(layer, result)
    return hessians, made


def observed(model: torch.nn.Module, layer: LayerPlan) -> np.ndarray:
    """The Hessian that a plain forward pass of the whole model shows, float64 [K, K]."""
    seen = []
    hook = model.get_submodule(layer.name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(windows())
    hook.remove()
    rows = torch.cat(seen).reshape(-1, layer.shape[1]).double().numpy()
    return rows.T @ rows / len(rows)


def check_hessians(load_it: Callable[[], torch.nn.Module]) -> None:
    """Every Hessian is that of a model whose earlier blocks are quantized and whose own block is not."""
    hessians, made = run_through(load_it)
    model = load_it()
    previous: list[LayerPlan] = []
    block = None
    for group in groups_of(plan(model, QuantizeOptions(head="keep"))):
        number = next(part for part in group[0].name.split(".") if part.isdigit())
        if number != block:
            for layer in previous:
                weight = torch.from_numpy(dequantize(made[layer.name]))
                model.get_submodule(layer.name).weight.data = weight.T.contiguous() if layer.kind == "conv1d" else weight
            block, previous = number, []
        previous += group
        true = observed(model, group[0])
        assert np.abs(hessians[group[0].group] - true).max() <= 1e-4 * np.abs(true).max(), group[0].name


def test_hessians_are_those_behind_the_quantized_prefix(tiny_model_dir: Path) -> None:
    check_hessians(lambda: load(tiny_model_dir))


def test_a_model_with_conv1d_and_biases() -> None:
    def load_it() -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()

    check_hessians(load_it)


def test_nothing_depends_on_threads(tiny_model_dir: Path) -> None:
    one, three = (run_through(lambda: load(tiny_model_dir), threads) for threads in (1, 3))
    assert all(one[0][group].tobytes() == hessian.tobytes() for group, hessian in three[0].items())
    assert all(one[1][name].packed.tobytes() == result.packed.tobytes() for name, result in three[1].items())


def test_layers_outside_the_blocks_have_no_hessian(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    layers = plan(model, QuantizeOptions())
    calibrator = Calibrator(model, layers, windows())
    head = [layer for layer in layers if layer.role == "head"]
    assert calibrator.hessian(head) is None


def test_what_cannot_be_calibrated_is_refused(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    layers = plan(model, QuantizeOptions(head="keep"))
    with pytest.raises(OptionError, match="windows of tokens"):
        Calibrator(model, layers, windows()[:0])
    with pytest.raises(UnsupportedModelError, match="list of blocks"):
        Calibrator(torch.nn.Sequential(torch.nn.Linear(64, 64)), layers, windows())
    calibrator, groups = Calibrator(model, layers, windows()), groups_of(layers)
    calibrator.hessian(groups[-1])
    with pytest.raises(UnsupportedModelError, match="block by block"):
        calibrator.hessian(groups[0])
    model = load(tiny_model_dir)
    inner = model.model.norm

    class Between(torch.nn.Module):
        """A list of blocks with something in between."""

        def __init__(self) -> None:
            super().__init__()
            self.embed, self.blocks = torch.nn.Embedding(260, 64), torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(2)])

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.blocks[1](inner(self.blocks[0](self.embed(input_ids))))

    chain = Between()
    layers = plan(chain, QuantizeOptions(head="keep"))
    with pytest.raises(UnsupportedModelError, match="form a chain"):
        Calibrator(chain, layers, windows()).hessian(layers[:1])


def test_a_model_writes_the_same_text_for_the_same_seed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model_dir)
    monkeypatch.setattr("septet.calibration.sampling._BATCH_WINDOWS", 2)
    state = torch.get_rng_state()
    first, threaded = (sample_windows(model, 5, 12, START, seed=3, threads=threads) for threads in (1, 3))
    assert first.shape == (5, 12) and first.dtype == torch.int64 and (first[:, 0] == START).all()
    assert torch.equal(first, threaded) and torch.equal(state, torch.get_rng_state())
    assert len({tuple(row) for row in first.tolist()}) == 5
    assert not torch.equal(first, sample_windows(model, 5, 12, START, seed=4))
