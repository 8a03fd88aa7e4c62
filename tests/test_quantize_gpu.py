"""Quantizing on a GPU: without statistics the bytes of the processor, with statistics its quality; every part but the kernels runs here."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoints
from group_cases import NAMES, assert_same, correlated, encoder, known_of, settings, weights_of
from needs import needs
from septet import quantize_gpu
from septet.checkpoint.tensor_file import StoredMatrix, open_tensor_file
from septet.errors import CheckpointError, OptionError
from septet.quantize import GroupStatistics, QuantizedTensor, dequantize, quantize_trellis
from septet.quantize.factorization import Factor, factorize
from septet.quantize.feedback import Sheet, encode_sheets
from septet.quantize.statistics import OUTPUT_DAMPINGS, corrected, input_metric, output_factor
from septet.quantize_gpu import factorization, feedback, uploads
from septet.quantize_gpu import statistics as on_gpu
from septet.quantize_gpu.outputs import OutputFactors


@pytest.mark.parametrize(("inputs", "outputs", "bits"), [(70, [100, 36], 7), (64, [64, 192], 6), (128, [33], 8)])
def test_without_statistics_the_bytes_are_the_processors(inputs: int, outputs: list[int], bits: int) -> None:
    weights = weights_of(inputs, outputs)
    weights[0][3] = 0
    weights[0][5, 7] = 4.0
    names = NAMES[: len(outputs)]
    made = quantize_gpu.quantize_trellis(weights, names, settings(bits))
    for one, expected in zip(made, quantize_trellis(weights, names, bits, 64, 5)):
        assert_same(one, expected)
        assert np.array_equal(quantize_gpu.dequantize(one, "cpu").numpy(), dequantize(expected))


def test_feedback_with_the_same_factors_gives_the_same_bytes() -> None:
    """Rows that know each other, rows that do not, sizes that fill no tile, and more columns than one batch."""
    inputs, rng = 4 * feedback.BATCH_STEPS + 10, np.random.default_rng(4)
    counts, knows = [200, 64, 100, 200], [True, False, False, True]
    rotated = [rng.standard_normal((count, inputs)).astype(np.float32) for count in counts]
    factor = factorize(correlated(inputs, 5))
    others = [factorize(correlated(count, 6), (1.0,), 64) if known else Factor(None) for count, known in zip(counts, knows)]
    expected = encode_sheets([Sheet(*pair) for pair in zip(rotated, others)], factor, 7)

    def there(known: Factor) -> factorization.Factor | None:
        return None if known.coefficients is None else factorization.Factor(torch.from_numpy(known.coefficients), known.shift)

    sheets = [feedback.Sheet(torch.from_numpy(rows), there(known)) for rows, known in zip(rotated, others)]
    for (packed, levels), (wanted, wanted_levels) in zip(feedback.encode_sheets(sheets, there(factor), 7, encoder), expected):
        assert np.array_equal(packed.numpy(), wanted)
        assert np.array_equal(levels.numpy(), wanted_levels)


@pytest.fixture(params=[1024, 64], ids=["one panel", "panels"])
def panel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factorization, "_PANEL", request.param)
    monkeypatch.setattr(on_gpu, "_SLAB", 20 * request.param)


def test_factors_are_those_of_the_processor_up_to_rounding(panel: None) -> None:
    """And the Hessian is still there afterwards."""
    hessian, tiles = correlated(170, 7), np.arange(170) // 4
    known = factorize(hessian)
    metric = on_gpu.coded_inputs(GroupStatistics(hessian), {"cpu": torch.ones(170)}, 1).metric()
    made = metric.known.factor(4)
    assert made.shift == known.shift
    below = np.where(tiles[:, None] > tiles, made.coefficients.numpy(), 0)
    assert np.abs(below - known.coefficients).max() <= 2.0 ** (known.shift - 30)
    damped = hessian * len(hessian) / hessian.trace() + known.damping * np.eye(170)
    assert np.allclose(metric.known.hessian().numpy(), damped, rtol=1e-12, atol=0)


def test_targets_for_moved_inputs_are_those_of_the_processor(panel: None) -> None:
    statistics, scale = known_of(160, [64]), np.linspace(-1, 2, 160, dtype=np.float32) + 0.01
    rows = np.random.default_rng(2).standard_normal((9, 160)).astype(np.float32)
    expected = corrected(rows, input_metric(statistics, scale, 32))
    assert np.abs(expected - rows).max() > 0.1
    coded = on_gpu.coded_inputs(statistics, {"cpu": torch.from_numpy(scale)}, 32)
    metric = coded.metric()
    metric.drift = coded.drift
    there, parts = torch.from_numpy(rows), [slice(0, 4), slice(4, 9)]
    made = [metric.corrected(there, parts, moved) for moved in ([None, None], [None, *on_gpu.moved_by(metric.drift, [there[4:]])])]
    metric.combine()
    for one in (*made, metric.corrected(there, parts, [None, None])):
        assert np.allclose(one.numpy(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    metric.forget_moves()
    assert metric.corrected(there, parts, [None, None]) is there


def test_a_hessian_that_needs_more_damping_is_whole_at_the_second_attempt(panel: None) -> None:
    hessian = torch.from_numpy(correlated(130, 3))
    hessian[100, 7] = hessian[7, 100] = 1.02 * (hessian[7, 7] * hessian[100, 100]).sqrt() + 0.02 * hessian.trace() / 130
    whole = hessian / (hessian.trace() / 130)
    assert torch.linalg.eigvalsh(whole)[0] < -0.0005
    made = factorization.decompose(hessian.clone(), (0.0005, 5.0))
    root = made.matrix.tril()
    assert torch.allclose(root @ root.T, whole + 5 * torch.eye(130), atol=1e-12)
    assert factorization.decompose(hessian.clone(), (0.0005,)) is None


def test_outputs_get_the_factors_of_the_processor_or_none(panel: None) -> None:
    """Of sensitivities that need no damping, or more; that are not known, of no use, or within a tile."""
    direction, scale = np.random.default_rng(8).standard_normal(192), np.where(np.arange(192) % 3, 1.5, -1.5)
    plain, hopeless = correlated(192, 4), np.full((192, 192), np.nan)
    # Its least eigenvalue is -1.9 of the mean diagonal.
    weak = -3 * np.outer(direction, direction) / (direction @ direction)
    weak[np.diag_indices(192)] = 1
    cases = [plain, None, weak, hopeless, np.eye(64)]
    made = OutputFactors([(case, scale[: 192 if case is None else len(case)]) for case in cases], 64, "cpu").result()
    assert [one is None for one in made] == [False, True, False, True, True]
    tiles = np.arange(192) // 64
    for case, one in ((plain, made[0]), (weak, made[2])):
        known = output_factor(case, scale, 64)
        below = np.where(tiles[:, None] > tiles, one.coefficients.numpy(), 0)
        assert one.shift == known.shift
        assert np.abs(below - known.coefficients).max() <= 2.0 ** (known.shift - 30)
    assert [output_factor(case, scale, 64).damping for case in (plain, weak)] == list(OUTPUT_DAMPINGS)


def uploaded(weight: StoredMatrix) -> torch.Tensor:
    there = torch.empty(tuple(weight.shape))
    uploads.upload(weight, there)
    return there


def test_a_matrix_that_is_read_in_pieces_is_the_one_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bits = np.random.default_rng(3).integers(0, 1 << 14, (50, 70)).astype(np.uint16)
    checkpoints.write_shard(tmp_path / "model.safetensors", {"other": bits[:3], "w": bits, "wide": bits.astype(np.float32)})
    file = open_tensor_file(tmp_path / "model.safetensors")
    monkeypatch.setattr("septet.quantize_gpu.uploads._PIECE", 1000)
    uploads._staging.cache_clear()
    for key in ("w", "wide"):
        stored = StoredMatrix(file, key)
        assert np.array_equal(uploaded(stored).numpy(), stored[:])
    uploads._staging.cache_clear()
    file.path.write_bytes(file.path.read_bytes()[:-16000])
    with pytest.raises(CheckpointError, match="a file that ends early"):
        uploaded(StoredMatrix(file, "w"))
    uploads._staging.cache_clear()


def loss(weights: list[np.ndarray], made: list[QuantizedTensor], known: GroupStatistics) -> float:
    errors = [weight - dequantize(one) for weight, one in zip(weights, made)]
    return sum(float(np.einsum("nk,kl,nl->", error, known.inputs, error)) for error in errors)


def test_with_statistics_the_loss_is_the_processors() -> None:
    inputs, outputs = 132, [192, 64]
    weights, known = weights_of(inputs, outputs), known_of(inputs, outputs)
    made = quantize_gpu.quantize_trellis(weights, NAMES, settings(), lambda: known)
    expected = quantize_trellis(weights, NAMES, 7, 64, 5, statistics=known)
    assert loss(weights, made, known) == pytest.approx(loss(weights, expected, known), rel=0.02)
    assert np.mean(made[0].packed == expected[0].packed) > 0.5
    assert [one.config().keys() for one in made] == [one.config().keys() for one in expected]
    for one in made:
        stored = QuantizedTensor(**{field.name: getattr(one, field.name) for field in fields(QuantizedTensor)})
        # First those that are there still, then those that the bytes stand for.
        for _ in range(2):
            assert np.array_equal(quantize_gpu.dequantize(one, "cpu").numpy(), dequantize(stored))
            assert not one.decoded


def test_statistics_that_say_nothing_mean_plain_rounding() -> None:
    weights = weights_of(64, [64])
    nothing = GroupStatistics(np.full((64, 64), np.nan))
    made = quantize_gpu.quantize_trellis(weights, ["w"], settings(), lambda: nothing)
    assert_same(made[0], quantize_trellis(weights, ["w"], 7, 64, 5)[0])


KERNEL_CHECK = """
import numpy as np, torch
from septet.codes import trellis
from septet.quantize_gpu import kernels, rotation
device, rng = "{device}", np.random.default_rng(8)
if device == "cpu":
    import triton_interpreter
for bits in {widths}:
    fixed = rng.integers(-1020, 1021, ({tiles}, 256)).astype(np.int16)
    fixed[0, :128] = 0
    made = kernels.encode(torch.from_numpy(fixed).to(device), bits).cpu().numpy()
    assert np.array_equal(made, trellis.windows_of_symbols(trellis.encode(fixed, bits), bits)), bits
values = rng.standard_normal((37, 70))
total = kernels.sum_columns(torch.from_numpy(values).to(device)).cpu().numpy()
assert np.array_equal(total, np.add.accumulate(values, axis=0)[-1])
for dtype in (torch.float32, torch.float64):
    many = [(2, (1 << 18, 3))] if device == "cuda" else []
    for block, shape in (*many, (2, (37, 70)), (128, (128, 384)), (256, (512, 256)), (1024, (1024, 3)), (4096, (5, 4096))):
        matrix = torch.from_numpy(rng.standard_normal(shape)).to(dtype)
        for along_outputs in (False, True):
            if shape[not along_outputs] % block == 0:
                expected = rotation.hadamard(matrix, block, along_outputs)
                there = matrix.to(device, copy=True)
                for out in (torch.empty_like(there), there):
                    assert torch.equal(kernels.hadamard(there, block, along_outputs, out).cpu(), expected), (dtype, block, along_outputs)
print("equal")
"""


def check_kernels(device: str, widths: tuple[int, ...], tiles: int, **variables: str) -> None:
    """The kernels against the definitions, in a process of their own, since Triton reads its variables when it is imported."""
    code = KERNEL_CHECK.format(device=device, widths=widths, tiles=tiles)
    paths = str(Path(quantize_gpu.__file__).parents[2]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")
    environment = os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "equal", result.stderr


@needs("triton", "the encoder's definition is tested without")
def test_kernels_in_the_interpreter_are_exact() -> None:
    check_kernels("cpu", (7,), 1, TRITON_INTERPRET="1")


@needs("cuda", "without one the kernels run in Triton's interpreter")
def test_kernels_on_a_gpu_are_exact() -> None:
    check_kernels("cuda", (6, 7, 8), 150)


@needs("cuda", "without one the kernels run in Triton's interpreter")
def test_a_gpu_without_statistics_writes_the_bytes_of_the_processor() -> None:
    weights = weights_of(576, [576, 192])
    weights[0][5, 7] = 4.0
    for one, expected in zip(quantize_gpu.quantize_trellis(weights, NAMES, quantize_gpu.Settings()), quantize_trellis(weights, NAMES)):
        assert_same(one, expected)
        assert np.array_equal(quantize_gpu.dequantize(one, "cuda").cpu().numpy(), dequantize(expected))


@needs("cuda", "without one the kernels run in Triton's interpreter")
def test_a_gpu_with_statistics_loses_what_the_processor_loses() -> None:
    inputs, outputs = 576, [576, 192]
    weights, known = weights_of(inputs, outputs), known_of(inputs, outputs)
    made, again = (quantize_gpu.quantize_trellis(weights, NAMES, quantize_gpu.Settings(), lambda: known) for _ in range(2))
    assert loss(weights, made, known) == pytest.approx(loss(weights, quantize_trellis(weights, NAMES, statistics=known), known), rel=0.02)
    for one, other in zip(made, again):
        assert_same(one, other)


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cpu:0", "", "cuda:0,", "cuda:0,cpu"])
def test_an_unknown_device_is_refused(device: str) -> None:
    from septet.cli.device import check_device

    with pytest.raises(OptionError, match=r"device must be cpu, cuda or cuda:N"):
        check_device(device)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    from septet.cli.device import check_device, quantizer_on

    check_device("cpu")
    assert quantizer_on("cpu") is None
    with pytest.raises(OptionError, match="GPU that torch can use"):
        check_device("cuda:4711")


@pytest.mark.parametrize("effort", [0, 2])
def test_a_checkpoint_comes_out_as_on_the_processor(
    effort: int, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way of a GPU on the processor: without calibration all bytes are the same, with it the same layers are stored."""
    from checkpoints import contents
    from septet.checkpoint import QuantizeOptions
    from septet.cli.quantize import quantize_with_bar

    monkeypatch.setattr("septet.quantize_gpu.work._kernel", lambda device, feedback: encoder)
    options = QuantizeOptions(effort=effort, calibration="self" if effort else "none", calibration_tokens=600 if effort else 0)
    for out, device in (("here", "cpu"), ("there", "cpu:0")):
        assert quantize_with_bar(str(tiny_model_dir), tmp_path / out, options, calibration="self", device=device)
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert here.keys() == there.keys()
    assert (here == there) == (effort == 0)
    sizes = {name: len(content) for name, content in here.items() if name.endswith(".safetensors")}
    assert sizes == {name: len(there[name]) for name in sizes}
