"""Quantizing on several GPUs: their number changes no byte. And the kernels that keep each of them busy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import test_calibration
from cuda_layout import same_layout
from group_cases import NAMES, assert_same, correlated, known_of, settings, weights_of
from needs import needs, reason
from septet import quantize_gpu
from septet.calibration import Machine
from septet.checkpoint import QuantizeOptions
from septet.codes import trellis, trellis_search
from septet.errors import OptionError
from septet.model import plan
from septet.quantize_gpu import factorization, feedback


@pytest.mark.parametrize(("knows", "per_input"), [(True, 2), (True, 1000), (False, 2)])
def test_more_devices_change_no_byte(knows: bool, per_input: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors stand in for GPUs; with moved inputs made up for in both ways."""
    monkeypatch.setattr("septet.quantize_gpu.shares._ROWS_PER_INPUT", per_input)
    inputs, outputs = 36, [2048, 192, 64]
    weights, known = weights_of(inputs, outputs), known_of(inputs, outputs) if knows else None
    names = [*NAMES, "block.v"]
    expected = quantize_gpu.quantize_trellis(weights, names, settings(), lambda: known)
    for helpers in (("cpu:0",), ("cpu:0", "cpu:1", "cpu:2", "cpu:3", "cpu:4")):
        made = quantize_gpu.quantize_trellis(weights, names, replace(settings(), helpers=helpers), lambda: known)
        for one, other in zip(made, expected):
            assert_same(one, other)


def test_a_gpu_without_a_share_gets_no_copy() -> None:
    weights, known = weights_of(36, [64]), known_of(36, [64])
    expected = quantize_gpu.quantize_trellis(weights, NAMES[:1], settings(), lambda: known)
    made = quantize_gpu.quantize_trellis(weights, NAMES[:1], replace(settings(), helpers=("cuda:4711",)), lambda: known)
    assert_same(made[0], expected[0])


def test_more_gpus_see_the_same_to_the_last_bit(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors stand in for GPUs. Sums have several panels, and windows come one by one."""
    monkeypatch.setattr("septet.calibration.sums._PANEL", 24)
    monkeypatch.setattr("septet.calibration.blocks._TOKENS_TOGETHER", 16)
    one = Machine(device="cpu:0")
    sensitivity = test_calibration.measured(tiny_model_dir, one)
    others = test_calibration.measured(tiny_model_dir, replace(one, helpers=("cpu:1", "cpu:2")))
    for layer in plan(test_calibration.load(tiny_model_dir), QuantizeOptions(head="keep")):
        assert np.array_equal(others.inputs(layer.group), sensitivity.inputs(layer.group)), layer.group
        assert np.array_equal(others.outputs(layer.name), sensitivity.outputs(layer.name)), layer.name
    expected = test_calibration.run_through(lambda: test_calibration.load(tiny_model_dir), one, sensitivity)[0]
    several = replace(one, helpers=("cpu:1", "cpu:2"))
    found = test_calibration.run_through(lambda: test_calibration.load(tiny_model_dir), several, sensitivity)[0]
    assert found.keys() == expected.keys()
    for group, known in expected.items():
        assert np.array_equal(found[group].inputs, known.inputs) and np.array_equal(found[group].drift, known.drift), group


@needs("two-gpus", "above, processors stand in for them")
@pytest.mark.parametrize("inputs", [576, 1600])
def test_two_gpus_write_the_bytes_of_one(inputs: int) -> None:
    outputs = [2048, 1024]
    weights, known = weights_of(inputs, outputs), known_of(inputs, outputs)
    two, one = (quantize_gpu.Settings(device="cuda:0", helpers=helpers) for helpers in (("cuda:1",), ()))
    # Two first: what torch loads at a first call it must not load in two threads.
    made = quantize_gpu.quantize_trellis(weights, NAMES, two, lambda: known)
    for tensor, expected in zip(made, quantize_gpu.quantize_trellis(weights, NAMES, one, lambda: known)):
        assert_same(tensor, expected)


@needs("two-gpus", "on one GPU nothing else can be the current one")
def test_kernels_run_where_their_tensors_are() -> None:
    """Not on the thread's current GPU, where nothing would wait for what the other one is still doing."""
    from septet.quantize_gpu import kernels

    there = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to("cuda:1")
    with torch.cuda.device("cuda:0"):
        for _ in range(20):
            there = (there @ there.T).clamp(-1, 1)
            made = kernels.hadamard(there, 64, False, torch.empty_like(there)), kernels.sum_columns(there)
    with torch.cuda.device("cuda:1"):
        torch.cuda.synchronize()
        expected = kernels.hadamard(there, 64, False, torch.empty_like(there)), kernels.sum_columns(there)
    assert all(map(torch.equal, made, expected))


def test_a_list_of_gpus_names_each_once() -> None:
    from septet.cli.device import check_device, machine_of

    with pytest.raises(OptionError, match="every GPU of a list must come once, got cuda,cuda:0"):
        check_device("cuda,cuda:0")
    with pytest.raises(OptionError, match="GPU that torch can use"):
        check_device("cuda:0,cuda:4711")
    machine = machine_of(3, "cuda:1,cuda:0")
    assert (machine.threads, machine.devices, machine.is_gpu) == (3, ("cuda:1", "cuda:0"), True)
    assert machine_of(0, "cpu").devices == ("cpu",)


@needs("cuda", "below, its kernels are compiled without")
def test_the_encoder_in_clusters_and_the_steps_around_it_are_exact() -> None:
    """Against the Triton kernel and torch's operations, which other tests compare with the definitions, and against a definition."""
    from septet.quantize_gpu import clusters, kernels

    if not clusters.fits(0):
        pytest.skip(reason("hopper", "this GPU has no clusters; below, the kernels are compiled for those that have"))
    rng, inputs, rows = np.random.default_rng(5), 4 * feedback.BATCH_STEPS * 2 + 10, (1024, 64, 100, 200)
    factor = factorization.decompose(torch.from_numpy(correlated(inputs, 1)).cuda(), (0.03,)).factor(4)
    others = [factorization.decompose(torch.from_numpy(correlated(count, 2)).cuda(), (1.0,)).factor(64) for count in rows]
    sheets = [
        feedback.Sheet(torch.from_numpy(rng.standard_normal((count, inputs)).astype(np.float32)).cuda(), None if count == 100 else other)
        for count, other in zip(rows, others)
    ]
    for bits in (6, 7, 8):
        for count in (1, 67, 190, 264):
            fixed = torch.from_numpy(rng.integers(-1020, 1021, (count, 256)).astype(np.int16)).cuda()
            out = torch.full((count, 128), -1, dtype=torch.int32, device="cuda")
            assert torch.equal(clusters.encode(fixed, bits, out), kernels.encode(fixed, bits)), (bits, count)
            symbols = trellis_search.search_from_both_ends(fixed.cpu().numpy(), trellis.window_levels(bits), bits)
            # A second time: nothing is left of the first.
            for empty in (torch.full_like(out, -1), torch.full_like(out, -1)):
                windows = clusters.encode_from_both_ends(fixed, bits, empty).cpu().numpy()
                assert np.array_equal(windows, trellis.windows_of_symbols(symbols, bits)), (bits, count)
        both = clusters.encode_from_both_ends, lambda fixed, bits: clusters.encode_from_both_ends(fixed, bits)
        made, expected = (feedback.encode_sheets(sheets, factor, bits, one) for one in both)
        for (packed, levels), (wanted, wanted_levels) in zip(made, expected):
            assert torch.equal(packed, wanted) and torch.equal(levels, wanted_levels), bits


@needs("nvrtc", "the Triton encoder is tested without")
def test_kernels_compile_for_every_architecture_that_has_clusters() -> None:
    from septet.gpu import driver
    from septet.quantize_gpu import clusters, steps

    for architecture in ("sm_90", "sm_100", "sm_120"):
        options = f"--gpu-architecture={architecture}", "--std=c++17"
        for ends, most in clusters.MOST_TILES.items():
            for bits, tiles in most.items():
                assert driver.compile_source(clusters.source_of(bits, tiles, ends), options)
        source = steps.source_of(7, 4 * feedback.BATCH_STEPS) + same_layout("Arguments", steps.Arguments)
        assert driver.compile_source(source, options)


def test_as_many_tiles_together_as_take_least() -> None:
    from septet.quantize_gpu import clusters

    chosen = {count: clusters._tiles_together(count, 66, 4) for count in (1, 66, 67, 132, 264, 448)}
    assert chosen == {1: 1, 66: 1, 67: 2, 132: 2, 264: 4, 448: 4}
    assert [clusters._tiles_together(count, 66, 2) for count in (132, 448)] == [2, 2]
    # From both ends half as many work at the same time, each for half as long.
    assert [clusters._tiles_together(count, 33, 8) for count in (32, 64, 224, 448)] == [1, 2, 7, 7]
