"""The nine tests of a codec, with bounds that follow from the step size, and the distortion figures the README quotes."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

import tolerances
from septet.codes import trellis
from septet.codes.split import FIELD_MAX
from septet.kernels import BACKEND_VARIABLE, LayerWeights
from septet.quantize import QuantizedTensor, dequantize, quantize_int8, quantize_split, quantize_trellis
from septet.quantize.baselines import quantize_baseline

CODES = ("split", "trellis", "int8")
#: Mean squared error of the codes on unit Gaussian weights that a small sample may reach: 1.3 times what a large one has.
SMALL_SAMPLE_MSE = {"split": 0.0244 * 1.3, "trellis": 0.0092 * 1.3, "int8": 1e-4}


@pytest.fixture
def chosen(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Every quantizer of the test uses this backend."""
    monkeypatch.setenv(BACKEND_VARIABLE, backend.NAME)
    return backend


def quantize(code: str, weight: np.ndarray, threads: int = 1) -> QuantizedTensor:
    """One matrix with the default options of a code."""
    if code == "split":
        return quantize_split(weight, threads=threads)
    return quantize_int8(weight, "layer") if code == "int8" else quantize_trellis([weight], ["layer"], threads=threads)[0]


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def nrmse(weight: np.ndarray, decoded: np.ndarray) -> float:
    """Root mean squared error over the standard deviation."""
    return float(np.sqrt(np.mean((weight - decoded) ** 2)) / weight.std())


def split_bound(stored: QuantizedTensor) -> np.ndarray:
    """Largest error of a min-max split code, [N, K]: half a step, and the ends of the range move with fp16 rounding."""
    slot = np.arange(stored.shape[1]) % 2
    scale, offset = (array.astype(np.float64)[:, slot] for array in (stored.scale, stored.offset))
    return tolerances.half_step(scale) + (np.array(FIELD_MAX)[slot] * scale + np.abs(offset)) * tolerances.FLOAT16_UNIT


# 1. round trip


def test_split_round_trip_stays_within_half_a_step(chosen: ModuleType, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 65, 34)
    stored = quantize_split(weight, range_method="minmax")
    assert (np.abs(weight - dequantize(stored)) <= split_bound(stored)).all()


def test_int8_round_trip_stays_within_half_a_step(chosen: ModuleType, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 5, 7)  # an odd width is not rotated, so the bound holds for each weight
    stored = quantize_int8(weight, "head")
    assert (np.abs(weight - dequantize(stored)) <= tolerances.half_step(stored.scale)[:, None]).all()


@pytest.mark.parametrize("bits, mse", [(6, 0.0183), (7, 0.0092), (8, 0.0050)])
def test_trellis_round_trip_has_the_error_of_the_code(chosen: ModuleType, rng: np.random.Generator, bits: int, mse: float) -> None:
    weight = gaussian(rng, 64, 64)
    stored = quantize_trellis([weight], ["layer"], bits)[0]
    assert nrmse(weight, dequantize(stored)) ** 2 <= 1.1 * mse  # 4096 weights
    assert stored.relative_error == pytest.approx(np.linalg.norm(weight - dequantize(stored)) / np.linalg.norm(weight), rel=1e-5)


def test_what_was_decoded_encodes_to_itself(chosen: ModuleType, rng: np.random.Generator) -> None:
    levels = trellis.decode(rng.integers(0, 128, (4, 128)).astype(np.uint8), 7)
    again = chosen.trellis_encode((4 * levels.astype(np.int16)), 7)
    assert np.array_equal(trellis.decode(again, 7), levels)


# 2. determinism


@pytest.mark.parametrize("code", CODES)
def test_same_bytes_on_every_run_and_number_of_threads(code: str, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 192, 64)
    first, second, threaded = (quantize(code, weight, threads).tensors() for threads in (1, 1, 3))
    for name in first:
        assert first[name].tobytes() == second[name].tobytes() == threaded[name].tobytes()


def layer_192_576() -> np.ndarray:
    """A matrix of the shape and size of SmolLM2's k_proj."""
    return gaussian(np.random.default_rng(7), 192, 576) * np.float32(0.03)


@pytest.fixture(scope="module")
def reference_layers() -> dict[str, QuantizedTensor]:
    """What the reference makes of it (ten seconds)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(BACKEND_VARIABLE, "reference")
        return {code: quantize(code, layer_192_576()) for code in CODES}


@pytest.mark.parametrize("code", CODES)
def test_same_bytes_on_every_backend(code: str, chosen: ModuleType, reference_layers: dict[str, QuantizedTensor]) -> None:
    here, there = quantize(code, layer_192_576()), reference_layers[code]
    assert here.config() == there.config()
    for name, array in there.tensors().items():
        assert here.tensors()[name].tobytes() == array.tobytes()


# 3. zero input


@pytest.mark.parametrize("code", CODES)
def test_zero_weights_stay_zero(code: str, chosen: ModuleType) -> None:
    stored = quantize(code, np.zeros((64, 8), np.float32))
    assert not dequantize(stored).any() and stored.relative_error == 0


@pytest.mark.parametrize("code", CODES)
def test_zero_rows_between_others_stay_zero(code: str, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 64, 32)
    weight[::3] = 0
    assert not dequantize(quantize(code, weight))[::3].any()


# 4. uniform input


@pytest.mark.parametrize("value", [1.0, -0.3, 1e-3, 700.0])
def test_equal_weights_cost_split_only_the_rounding_of_the_offset(value: float) -> None:
    weight = np.full((3, 10), value, np.float32)
    decoded = dequantize(quantize_split(weight))
    assert np.abs(weight - decoded).max() <= abs(value) * tolerances.FLOAT16_UNIT


def test_equal_weights_keep_the_trellis_within_its_step(chosen: ModuleType) -> None:
    """Signs and rotation make it the outer product of two Gaussian vectors: longer tails than a Gaussian, so up to twice its error."""
    weight = np.full((64, 64), 0.5, np.float32)
    assert quantize("trellis", weight).relative_error ** 2 <= 2 * 0.0092


# 5. large values


@pytest.mark.parametrize("code", CODES)
def test_large_weights_have_the_same_relative_error(code: str, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 64, 64)
    scaled = quantize(code, weight * np.float32(2.0**13))
    assert scaled.relative_error == pytest.approx(quantize(code, weight).relative_error, rel=0.02)
    assert np.isfinite(scaled.scale).all()


# 6. compression ratio


def test_split_is_9_1_times_smaller_than_float32(gaussian_4096: np.ndarray) -> None:
    stored = quantize_split(gaussian_4096, range_method="minmax")
    assert round(gaussian_4096.nbytes / stored.size_bytes, 2) == 9.10
    assert stored.packed.nbytes * 16 == gaussian_4096.size * 7  # exactly 7 bits per pair


# 7. odd sizes


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (3, 5), (63, 3), (65, 6), (1, 131)])
@pytest.mark.parametrize("code", CODES)
def test_any_size_works(code: str, shape: tuple[int, int], rng: np.random.Generator) -> None:
    weight = gaussian(rng, *shape)
    stored = quantize(code, weight)
    assert dequantize(stored).shape == shape
    # Few weights in one tile cannot do worse than a scalar code; 9 % of the energy is the bound of 3 bits with clipping.
    assert stored.relative_error <= 0.3
    layer = stored.config() | stored.tensors()
    assert layer["in_features"] == shape[1] and layer["weight"].ndim == 2
    as_layer(stored)


def as_layer(stored: QuantizedTensor) -> LayerWeights:
    """The kernels' view of it, which checks every shape."""
    blocks = stored.input_block, stored.output_block, stored.group_size
    arrays = stored.packed, stored.scale, stored.offset, stored.input_scale
    return LayerWeights(stored.code, stored.bits_per_pair, stored.shape[1], stored.shape[0], *arrays, *blocks)


# 8. extreme ranges


@pytest.mark.parametrize("code", CODES)
def test_rows_of_very_different_size(code: str, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 128, 64) * np.geomspace(1e-4, 1e4, 128, dtype=np.float32)[:, None]
    stored = quantize(code, weight)
    assert stored.relative_error**2 <= SMALL_SAMPLE_MSE[code]
    if code != "trellis":  # the rotation shares the error among the rows of a block
        rows = np.linalg.norm(weight - dequantize(stored), axis=1) / np.linalg.norm(weight, axis=1)
        assert rows.max() ** 2 <= 2 * SMALL_SAMPLE_MSE[code]


@pytest.mark.parametrize("size", [1e-9, 1e-7, 1e6, 1e9])
def test_trellis_reaches_beyond_the_range_of_float16(size: float, rng: np.random.Generator) -> None:
    stored = quantize("trellis", gaussian(rng, 64, 64) * np.float32(size))
    assert stored.relative_error**2 <= SMALL_SAMPLE_MSE["trellis"]


def test_one_outlier_costs_a_matrix_that_cannot_be_rotated_little(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 65, 33)
    weight[3, 4] = 1000
    assert quantize("trellis", weight).relative_error <= 0.1


# 9. batch consistency


@pytest.mark.parametrize("code", CODES)
def test_a_batch_is_as_many_single_tokens(code: str, chosen: ModuleType, rng: np.random.Generator) -> None:
    stored = quantize(code, gaussian(rng, 64, 32))
    layer, linear = chosen.prepare(as_layer(stored)), getattr(chosen, f"linear_{code}")
    x = gaussian(rng, 5, 32)
    together = linear(x, layer, "int8")
    assert np.array_equal(together, np.concatenate([linear(row[None], layer, "int8") for row in x]))


def test_rows_quantize_independently_of_each_other_in_split(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 130, 24)
    whole = quantize_split(weight)
    assert np.array_equal(whole.scale[64:128], quantize_split(weight[64:128]).scale)
    assert np.array_equal(whole.packed[1], quantize_split(weight[64:128]).packed[0])


# the figures


@pytest.fixture(scope="module")
def gaussian_4096() -> np.ndarray:
    """4096 x 4096 unit Gaussian weights; a row is an output channel."""
    return np.random.default_rng(1).standard_normal((4096, 4096), dtype=np.float32)


def test_split_has_the_known_distortion(gaussian_4096: np.ndarray, capsys: pytest.CaptureFixture) -> None:
    methods = ("minmax_shared", "minmax", "mse")
    percent = {m: 100 * nrmse(gaussian_4096, dequantize(quantize_split(gaussian_4096, range_method=m))) for m in methods}
    plain = {
        s: 100 * nrmse(gaussian_4096, quantize_baseline(gaussian_4096, 4, s == "symmetric").weight) for s in ("symmetric", "asymmetric")
    }
    with capsys.disabled():
        print("\nnRMSE on 4096 x 4096 unit Gaussian weights:", *(f"split {m} {v:.2f} %," for m, v in percent.items()), end=" ")
        print(*(f"INT4 {s} {v:.2f} %" for s, v in plain.items()), sep=", ")
    assert percent["minmax_shared"] == pytest.approx(23.4, abs=0.3)
    assert percent["minmax"] == pytest.approx(22.2, abs=0.3)
    assert percent["mse"] <= 15.9


def test_trellis_has_less_error_than_int4(gaussian_4096: np.ndarray, capsys: pytest.CaptureFixture) -> None:
    stored = quantize_trellis([gaussian_4096], ["layer"])[0]
    percent = 100 * nrmse(gaussian_4096, dequantize(stored))
    with capsys.disabled():
        print(f"\ntrellis {percent:.2f} % at {stored.effective_bits:.3f} bits", end=" ")
    assert percent <= 9.6
    assert stored.effective_bits <= 3.51


@pytest.mark.parametrize("bits, mse", [(6, 0.0183), (8, 0.0050)])
def test_trellis_with_6_and_8_bits(gaussian_4096: np.ndarray, bits: int, mse: float) -> None:
    weight = np.ascontiguousarray(gaussian_4096[:1024, :1024])
    stored = quantize_trellis([weight], ["layer"], bits)[0]
    assert nrmse(weight, dequantize(stored)) ** 2 <= mse
