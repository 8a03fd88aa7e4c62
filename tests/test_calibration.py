"""Calibration: Hessians are those of the inputs behind the quantized prefix, whatever the threads; a model can write its own text."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from septet.calibration import Calibrator, Machine, Sensitivity, measure, sample_windows
from septet.checkpoint import QuantizeOptions
from septet.cli.device import in_host_memory
from septet.errors import OptionError, UnsupportedModelError
from septet.loading import load_model
from septet.model import LayerPlan, plan
from septet.quantize import GroupStatistics, QuantizedTensor, dequantize, quantize_trellis

START = 256
#: Models are treated as on a GPU: blocks are brought and taken away, several windows are computed together, sums are torch's own.
AS_ON_A_GPU = Machine(device="cpu:0")


def windows(count: int = 3, context: int = 16) -> torch.Tensor:
    return torch.randint(0, 256, (count, context), generator=torch.Generator().manual_seed(1))


def load(path: Path) -> torch.nn.Module:
    return load_model(path, dtype="float32")


def groups_of(layers: list[LayerPlan]) -> list[list[LayerPlan]]:
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    return list(groups.values())


def quantized(model: torch.nn.Module, group: list[LayerPlan], known: GroupStatistics | None) -> list[QuantizedTensor]:
    weights = [model.get_submodule(layer.name).weight.detach().numpy() for layer in group]
    weights = [np.ascontiguousarray(weight.T) if layer.kind == "conv1d" else weight for layer, weight in zip(group, weights)]
    return quantize_trellis(weights, [layer.name for layer in group], 7, statistics=known)


def run_through(
    load_it: Callable[[], torch.nn.Module], machine: Machine, sensitivity: Sensitivity | None = None
) -> tuple[dict[str, GroupStatistics], dict[str, QuantizedTensor]]:
    """Calibrate and quantize every layer: statistics by group, results by layer."""
    model, source = load_it(), load_it()
    layers = plan(source, QuantizeOptions(head="keep"))
    calibrator, statistics, made = Calibrator(model, layers, windows(), machine, sensitivity), {}, {}
    for group in groups_of(layers):
        known = calibrator.statistics(group)
        known = statistics[group[0].group] = known and in_host_memory(known)
        for layer, result in zip(group, quantized(source, group, known)):
            made[layer.name] = result
            calibrator.take_over(layer, result)
    return statistics, made


def inputs_of(model: torch.nn.Module, layer: LayerPlan) -> np.ndarray:
    """What a plain forward pass of the whole model shows at a layer, float64 [tokens, K]."""
    seen = []
    hook = model.get_submodule(layer.name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    model(windows())
    hook.remove()
    return torch.cat(seen).reshape(-1, layer.shape[1]).double().numpy()


def check_statistics(
    load_it: Callable[[], torch.nn.Module], sensitivity: Sensitivity | None = None, machine: Machine | None = None
) -> None:
    """Every Hessian is that of a model whose earlier layers are quantized, and drift is against one whose are not."""
    statistics, made = run_through(load_it, machine or Machine(1), sensitivity)
    model, original = load_it(), load_it()
    for group in groups_of(plan(model, QuantizeOptions(head="keep"))):
        known, rows = statistics[group[0].group], inputs_of(model, group[0])
        true = rows.T @ rows / len(rows)
        if sensitivity is None:
            assert np.abs(known.inputs - true).max() <= 1e-4 * np.abs(true).max(), group[0].name
            assert known.drift is None and known.outputs is None
        else:
            drift = (inputs_of(original, group[0]) - rows).T @ rows / len(rows)
            assert np.abs(known.drift - drift).max() <= 1e-4 * np.abs(true).max(), group[0].name
            assert known.inputs.trace() == pytest.approx(true.trace(), rel=1e-4)
            assert known.outputs is not None
        for layer in group:
            weight = torch.from_numpy(dequantize(made[layer.name]))
            model.get_submodule(layer.name).weight.data = weight.T.contiguous() if layer.kind == "conv1d" else weight


def test_hessians_are_those_behind_the_quantized_prefix(tiny_model_dir: Path) -> None:
    check_statistics(lambda: load(tiny_model_dir))


def measured(path: Path, machine: Machine | None = None, seed: int = 0) -> Sensitivity:
    model = load(path)
    return measure(model, plan(model, QuantizeOptions(head="keep")), windows(), seed, machine or Machine(1))


class Mixture(torch.nn.Module):
    """Three copies of an MLP; each token goes to one of the first two, the third never sees any."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(copy.deepcopy(mlp) for _ in range(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        chosen, output = (hidden[..., 0] > 0).long(), torch.zeros_like(hidden)
        for number in range(2):
            output[chosen == number] = self.experts[number](hidden[chosen == number])
        return output


def load_mixture(path: Path) -> torch.nn.Module:
    model = load(path)
    for block in model.model.layers:
        block.mlp = Mixture(block.mlp)
    return model


@pytest.mark.parametrize("measured_first", [False, True])
def test_experts_share_the_statistics_of_all_their_tokens(measured_first: bool, tiny_model_dir: Path) -> None:
    model, sensitivity = load_mixture(tiny_model_dir), None
    layers = plan(model, QuantizeOptions(head="keep"))
    if measured_first:
        sensitivity = measure(load_mixture(tiny_model_dir), layers, windows())
    statistics, made = run_through(lambda: load_mixture(tiny_model_dir), Machine(1), sensitivity)
    group = [layer for layer in layers if layer.name.startswith("model.layers.0.mlp.experts.") and "down" not in layer.name]
    known = statistics[group[0].group]
    assert len(group) == 6 and len({layer.group for layer in group}) == 1
    for layer in layers[: layers.index(group[0])]:
        model.get_submodule(layer.name).weight.data = torch.from_numpy(dequantize(made[layer.name]))
    rows = np.concatenate([inputs_of(model, layer) for layer in group if layer.name.endswith(("0.gate_proj", "1.gate_proj"))])
    true = rows.T @ rows / len(rows)
    if measured_first:
        assert known.inputs.trace() == pytest.approx(true.trace(), rel=1e-4)
    else:
        assert np.abs(known.inputs - true).max() <= 1e-4 * np.abs(true).max()
    assert all(0 < made[layer.name].relative_error < 1 for layer in group)


def test_drift_is_against_the_unquantized_model(tiny_model_dir: Path) -> None:
    check_statistics(lambda: load(tiny_model_dir), measured(tiny_model_dir))


def test_a_gpu_sees_the_same(tiny_model_dir: Path) -> None:
    found = measured(tiny_model_dir, AS_ON_A_GPU)
    check_statistics(lambda: load(tiny_model_dir), found, AS_ON_A_GPU)
    check_statistics(lambda: load(tiny_model_dir), None, AS_ON_A_GPU)


def test_a_model_comes_back_from_a_gpu_as_it_was(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is too large to be there as a whole."""
    model = load_model(tiny_model_dir, dtype="bfloat16")
    before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()}
    whole = sample_windows(model, 3, 8, START, machine=AS_ON_A_GPU)
    monkeypatch.setattr("septet.calibration.sampling._MOST_BYTES_FOR_WEIGHTS", 0)
    assert torch.equal(whole, sample_windows(model, 3, 8, START, machine=AS_ON_A_GPU))
    measure(model, plan(model, QuantizeOptions(head="keep")), windows(), machine=AS_ON_A_GPU)
    assert {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in model.state_dict().items()} == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_sensitivity_is_that_of_a_plain_backward_pass(tiny_model_dir: Path) -> None:
    """Against autograd on the whole model, with the same drawn labels."""
    found, model = measured(tiny_model_dir), load(tiny_model_dir)
    layers = plan(model, QuantizeOptions(head="keep"))
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {layer.name: [] for layer in layers}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            rows = inputs[0].detach()[0].double().numpy()
            output.register_hook(lambda gradient: seen[name].append((rows, gradient[0].double().numpy())))

        return hook

    for layer in layers:
        model.get_submodule(layer.name).register_forward_hook(watch(layer.name))
    for number, window in enumerate(windows()):
        scores = torch.log_softmax(model(window[None]).logits[0], -1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=torch.Generator().manual_seed(number))
        (-scores.gather(1, drawn).sum()).backward()
    weighed: dict[str, np.ndarray] = {}
    for layer in layers:
        inputs, gradients = (np.concatenate(parts) for parts in zip(*seen[layer.name]))
        true = gradients.T @ gradients / len(gradients)
        assert found.outputs(layer.name).shape == (1, *true.shape)
        assert np.abs(found.outputs(layer.name)[0] - true).max() <= 1e-3 * np.abs(true).max(), layer.name
        weights = (gradients**2).sum(axis=1)
        part = (inputs * (weights / weights.mean())[:, None]).T @ inputs
        weighed[layer.group] = weighed.get(layer.group, 0) + part
    for group, true in weighed.items():
        scaled = found.inputs(group) * (true.trace() / found.inputs(group).trace())
        assert np.abs(scaled - true).max() <= 1e-3 * np.abs(true).max(), group


def test_sensitivity_does_not_depend_on_threads(tiny_model_dir: Path, tmp_path: Path) -> None:
    model = load(tiny_model_dir)
    layers = plan(model, QuantizeOptions(head="keep"))
    one, three, other = measured(tiny_model_dir), measured(tiny_model_dir, Machine(3)), measured(tiny_model_dir, seed=1)
    measure(model, layers, windows(), found=Sensitivity(tmp_path))
    kept = Sensitivity(tmp_path)
    for layer in layers:
        matrix = one.outputs(layer.name)
        assert matrix.tobytes() == three.outputs(layer.name).tobytes() == kept.outputs(layer.name).tobytes()
        assert matrix.tobytes() != other.outputs(layer.name).tobytes()
        assert one.inputs(layer.group).tobytes() == three.inputs(layer.group).tobytes() == kept.inputs(layer.group).tobytes()
    assert kept.inputs("another") is None and kept.outputs("another") is None


def test_a_model_with_conv1d_and_biases() -> None:
    def load_it() -> torch.nn.Module:
        torch.manual_seed(0)
        config = transformers.GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()

    check_statistics(load_it)


def test_nothing_depends_on_threads(tiny_model_dir: Path) -> None:
    known = measured(tiny_model_dir)
    one, three = (run_through(lambda: load(tiny_model_dir), Machine(threads), known) for threads in (1, 3))
    for group, statistics in three[0].items():
        assert one[0][group].inputs.tobytes() == statistics.inputs.tobytes()
        assert one[0][group].drift.tobytes() == statistics.drift.tobytes()
    assert all(one[1][name].packed.tobytes() == result.packed.tobytes() for name, result in three[1].items())


def test_nothing_is_known_of_layers_outside_the_blocks(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    layers = plan(model, QuantizeOptions())
    calibrator = Calibrator(model, layers, windows())
    head = [layer for layer in layers if layer.role == "head"]
    assert calibrator.statistics(head) is None


def test_what_cannot_be_calibrated_is_refused(tiny_model_dir: Path) -> None:
    model = load(tiny_model_dir)
    layers = plan(model, QuantizeOptions(head="keep"))
    with pytest.raises(OptionError, match="windows of tokens"):
        Calibrator(model, layers, windows()[:0])
    with pytest.raises(UnsupportedModelError, match="list of blocks"):
        Calibrator(torch.nn.Sequential(torch.nn.Linear(64, 64)), layers, windows())
    calibrator, groups = Calibrator(model, layers, windows()), groups_of(layers)
    calibrator.statistics(groups[-1])
    with pytest.raises(UnsupportedModelError, match="block by block"):
        calibrator.statistics(groups[0])
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
        Calibrator(chain, layers, windows()).statistics(layers[:1])


def test_a_model_writes_the_same_text_for_the_same_seed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model_dir)
    monkeypatch.setattr("septet.calibration.sampling._MOST_TOGETHER", 2)
    state = torch.get_rng_state()
    first, threaded = (sample_windows(model, 5, 12, START, seed=3, machine=Machine(threads)) for threads in (1, 3))
    assert first.shape == (5, 12) and first.dtype == torch.int64 and (first[:, 0] == START).all()
    assert torch.equal(first, threaded) and torch.equal(state, torch.get_rng_state())
    assert len({tuple(row) for row in first.tolist()}) == 5
    assert not torch.equal(first, sample_windows(model, 5, 12, START, seed=4))
