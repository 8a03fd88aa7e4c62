"""Laws of the parts of the quantizers: rotation, signs, scales, ranges, padding, and what is refused."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.codes.split import fields_of_symbols
from septet.codes.tile import matrix_of_tiles
from septet.errors import CheckpointError, CodeRangeError, OptionError, ShapeError
from septet.packing import unpack
from septet.quantize import dequantize, quantize_int8, quantize_split, quantize_trellis, ranges, rotation, scales
from septet.quantize.baselines import quantize_baseline
from septet.quantize.stored import stored_arrays


def gaussian(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


# rotation


@pytest.mark.parametrize(
    "sizes, cap, block", [([576], 256, 64), ([1536], 256, 256), ([576, 192], 256, 64), ([7], 256, 1), ([4096], 128, 128)]
)
def test_block_is_the_largest_power_of_two(sizes: list[int], cap: int, block: int) -> None:
    assert rotation.choose_block(sizes, cap) == block


def test_signs_are_bits_of_shake_256() -> None:
    digest = hashlib.shake_256(b"3/model.layers.0.mlp.down_proj/in").digest(2)
    expected = [-1.0 if digest[i // 8] >> (i % 8) & 1 else 1.0 for i in range(11)]
    assert rotation.random_signs(3, "model.layers.0.mlp.down_proj/in", 11).tolist() == expected


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_unrotate_undoes_rotate(log_in: int, log_out: int, inputs: int, outputs: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    blocks = 1 << log_in, 1 << log_out
    weight = gaussian(rng, outputs * blocks[1], inputs * blocks[0])
    output_scale = rng.choice(np.array([-2, 0.5, 1], np.float32), len(weight))
    input_scale = rng.choice(np.array([-1, 1], np.float32), weight.shape[1])
    there = rotation.rotate(weight, output_scale, input_scale, *blocks)
    back = rotation.unrotate(there, output_scale, input_scale, *blocks)
    # 2 * log2(block) float32 additions on each side and back, on sums no larger than 16 * 5 standard deviations.
    assert np.abs(back - weight).max() <= 1e-4
    assert np.linalg.norm(there) == pytest.approx(np.linalg.norm(weight / output_scale[:, None]), rel=1e-5)


def test_rows_without_a_scale_leave_their_block_alone(rng: np.random.Generator) -> None:
    weight, scale = gaussian(rng, 8, 4), np.array([1, 0] * 4, np.float32)
    emptied = weight * scale[:, None]
    rotated = [rotation.rotate(matrix, scale, np.ones(4, np.float32), 4, 8) for matrix in (weight, emptied)]
    assert np.array_equal(*rotated)


def test_a_group_shares_its_input_scale_and_blocks(rng: np.random.Generator) -> None:
    query, key = quantize_trellis([gaussian(rng, 192, 48), gaussian(rng, 64, 48) * 9], ["a.q", "a.k"])
    assert query.input_scale.tobytes() == key.input_scale.tobytes()
    assert (query.input_block, query.output_block) == (key.input_block, key.output_block) == (16, 64)
    assert not np.array_equal(np.sign(query.scale[:64]), np.sign(key.scale))
    alone = quantize_trellis([gaussian(rng, 192, 48)], ["a.k"])[0]
    assert not np.array_equal(alone.input_scale, key.input_scale)  # the first name of the group chooses the signs


# scales


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_sums_run_in_index_order(length: int, columns: int, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal((length, columns))
    expected = np.zeros(columns)
    for row in values:
        expected += row
    assert np.array_equal(scales.sum_columns(values), expected)
    assert np.array_equal(scales.sum_rows(np.ascontiguousarray(values.T)), expected)


def test_output_scale_gives_every_block_unit_mean_square(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 128, 40) * np.geomspace(1e-3, 1e3, 128, dtype=np.float32)[:, None]
    scale = scales.trellis_output_scale(scales.row_norms(weight), 32)
    energy = np.mean((weight / scale[:, None]).reshape(4, -1) ** 2, axis=1)
    assert energy == pytest.approx(np.ones(4), rel=1e-5)


def test_int8_scale_never_clips(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 300, 33)
    stored = quantize_int8(weight, "head")
    assert (stored.scale.astype(np.float64) * 127 >= np.abs(weight).max(axis=1)).all()
    assert (stored.scale.astype(np.float64) * 127 <= np.abs(weight).max(axis=1) * (1 + 2.0**-9)).all()


# ranges of the split code


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", ["channel", "group", "tensor"])
def test_better_methods_are_never_worse(symmetric: bool, granularity: str, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 20, 70) + rng.standard_exponential((20, 70)).astype(np.float32)
    errors = [quantize_split(weight, symmetric, granularity, 16, method).relative_error for method in ranges.METHODS]
    assert errors[2] <= errors[1] <= errors[0] * 1.02


@pytest.mark.parametrize("method", ranges.METHODS)
def test_codes_are_the_nearest_levels(method: str, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 6, 12)
    stored = quantize_split(weight, range_method=method)
    decoded = dequantize(stored)
    for field, largest in enumerate((15, 7)):
        levels = stored.scale[:, field, None] * np.arange(largest + 1, dtype=np.float32) + stored.offset[:, field, None]
        nearest = np.abs(weight[:, field::2, None] - levels[:, None, :]).min(axis=2)
        assert np.abs(np.abs(weight - decoded)[:, field::2] - nearest).max() <= 1e-6


def test_a_group_is_a_matrix_of_its_own(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 5, 20)
    grouped = quantize_split(weight, granularity="group", group_size=8)
    assert grouped.scale.shape == (5, 6)
    for index, columns in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        alone = quantize_split(np.ascontiguousarray(weight[:, columns]))
        assert np.array_equal(grouped.scale[:, 2 * index : 2 * index + 2], alone.scale)
        assert np.array_equal(dequantize(grouped)[:, columns], dequantize(alone))


def test_padding_of_split_is_symbol_zero(rng: np.random.Generator) -> None:
    fields = matrix_of_tiles(fields_of_symbols(unpack(quantize_split(gaussian(rng, 3, 6)).packed, 7)))
    assert not fields[3:].any() and not fields[:, 6:].any()


# descriptions


@pytest.mark.parametrize("shape", [(1, 1), (65, 6), (64, 128)])
def test_description_promises_the_stored_arrays(shape: tuple[int, int], rng: np.random.Generator) -> None:
    weight = gaussian(rng, *shape)
    made = [quantize_int8(weight, "x"), *quantize_trellis([weight], ["x"], 6)]
    made += [quantize_split(weight, symmetric, part, 4) for symmetric in (True, False) for part in ("channel", "group", "tensor")]
    for stored in made:
        promised = stored_arrays(stored.config(), "x")
        assert {name: (array.dtype, array.shape) for name, array in stored.tensors().items()} == promised
        assert stored.effective_bits == 8 * sum(array.nbytes for array in stored.tensors().values()) / weight.size


@pytest.mark.parametrize("change", [{"code": "vq"}, {"in_features": 0}, {"out_features": "7"}, {"bits_per_pair": 9}, {"in_features": True}])
def test_impossible_descriptions_are_refused(change: dict) -> None:
    entry = {"code": "trellis", "bits_per_pair": 7, "in_features": 8, "out_features": 8}
    with pytest.raises(CheckpointError, match="model.up_proj"):
        stored_arrays(entry | change, "model.up_proj")


# what is refused


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(value: float, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 8, 8)
    weight[5, 2] = value
    for make in (lambda: quantize_trellis([weight], ["layer.up"]), lambda: quantize_split(weight, name="layer.up")):
        with pytest.raises(CodeRangeError, match=r"weights of layer.up must be finite, got .* in row 5;"):
            make()
    with pytest.raises(CodeRangeError, match="layer.up"):
        quantize_int8(weight, "layer.up")


def test_weights_too_large_for_float16_are_named(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 8, 8) * np.float32(1e30)
    for make in (
        lambda: quantize_trellis([weight], ["up"]),
        lambda: quantize_split(weight, name="up"),
        lambda: quantize_int8(weight, "up"),
    ):
        with pytest.raises(CodeRangeError, match="of up must be at most 65504"):
            make()


def test_weights_too_small_for_float16_become_zero_and_say_so(rng: np.random.Generator) -> None:
    stored = quantize_trellis([gaussian(rng, 8, 8) * np.float32(1e-30)], ["up"])[0]
    assert not dequantize(stored).any() and stored.relative_error == 1


def test_unusable_arguments(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 8, 8)
    with pytest.raises(OptionError, match="power of two"):
        quantize_trellis([weight], ["up"], rotation_block=96)
    with pytest.raises(OptionError, match="multiple of 4"):
        quantize_split(weight, granularity="group", group_size=6)
    with pytest.raises(OptionError, match="one of channel, group, tensor"):
        quantize_split(weight, granularity="row")
    with pytest.raises(OptionError, match="range method"):
        quantize_split(weight, range_method="max")
    with pytest.raises(ShapeError, match="same in_features"):
        quantize_trellis([weight, weight[:, :4]], ["q", "k"])
    with pytest.raises(ShapeError, match="float32"):
        quantize_split(weight.astype(np.float64))


# baselines


@pytest.mark.parametrize(
    "bits, symmetric, group, metadata", [(4, True, None, 16 / 256), (4, False, 128, 32 / 128), (3, False, None, 32 / 256)]
)
def test_baselines_round_to_half_a_step(bits: int, symmetric: bool, group: int | None, metadata: float, rng: np.random.Generator) -> None:
    weight = gaussian(rng, 10, 256)
    baseline = quantize_baseline(weight, bits, symmetric, group)
    units = weight.reshape(-1, group or 256)
    low, high = units.min(axis=1), units.max(axis=1)
    step = np.maximum(high, -low) / (2 ** (bits - 1) - 1) if symmetric else (high - low) / (2**bits - 1)
    error = np.abs(baseline.weight.reshape(units.shape) - units)
    assert (error <= step[:, None] * (0.5 + 2.0**-6)).all()
    assert baseline.bits_per_weight == bits + metadata


def test_an_outlier_is_not_clipped_away(rng: np.random.Generator) -> None:
    """It would lower the squared error, and has been seen to ruin a model."""
    weight = gaussian(rng, 2, 16384)
    weight[:, 6] = 9
    stored = quantize_split(weight)
    assert np.abs(dequantize(stored)[:, 6] - 9).max() <= 2 * stored.scale[:, 0].max()
