"""Laws of the reference kernels: equal to dense products, one token or many, nothing from nothing, NaN from NaN."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

import tolerances
from layers import inner_matrix, int8_layer, output_matrix, rotated, split_layer, sylvester, trellis_layer
from septet.codes import trellis
from septet.codes.tile import tile_grid
from septet.errors import OptionError, ShapeError
from septet.kernels import LayerWeights, reference
from septet.kernels.reference_products import integer_product

Make = Callable[[np.random.Generator], LayerWeights]

#: Sizes that fill no tile, fill tiles exactly, or cross from one exact float32 piece of 1024 inputs to the next.
LAYERS: dict[str, Make] = {
    "trellis-1x1": lambda rng: trellis_layer(rng, 7, 1, 1),
    "trellis-6": lambda rng: trellis_layer(rng, 6, 96, 72, (8, 32)),
    "trellis-7": lambda rng: trellis_layer(rng, 7, 66, 70, (2, 2)),
    "trellis-8": lambda rng: trellis_layer(rng, 8, 64, 64, (64, 64)),
    "trellis-block": lambda rng: trellis_layer(rng, 7, 128, 96, (32, 64), activation_segment="block"),
    "trellis-odd-block": lambda rng: trellis_layer(rng, 7, 5, 6, (2, 1), activation_segment="block"),
    "trellis-wide": lambda rng: trellis_layer(rng, 7, 64, 2048, (256, 64)),
    "split-1x1": lambda rng: split_layer(rng, 1, 1),
    "split-channel": lambda rng: split_layer(rng, 70, 70),
    "split-symmetric": lambda rng: split_layer(rng, 65, 33, symmetric=True),
    "split-tensor": lambda rng: split_layer(rng, 64, 64, "tensor"),
    "split-group": lambda rng: split_layer(rng, 70, 90, "group", group_size=32),
    "split-group-symmetric": lambda rng: split_layer(rng, 3, 130, "group", symmetric=True, group_size=128),
    "int8-1x1": lambda rng: int8_layer(rng, 1, 1),
    "int8-odd": lambda rng: int8_layer(rng, 67, 77),
    "int8-rotated": lambda rng: int8_layer(rng, 50, 96, 32),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, rng: np.random.Generator) -> LayerWeights:
    return LAYERS[request.param](rng)


def run(layer: LayerWeights, x: np.ndarray, activations: str) -> np.ndarray:
    """The whole layer on the reference backend."""
    linear = getattr(reference, f"linear_{layer.code}")
    y = linear(x, reference.prepare(layer), activations)
    assert y.dtype == np.float32 and y.shape == (len(x), layer.out_features)
    return y


def tokens(rng: np.random.Generator, layer: LayerWeights, count: int = 5) -> np.ndarray:
    return rng.standard_normal((count, layer.in_features)).astype(np.float32)


# ---- whole layers ----


def test_float_activations_equal_the_dense_product(layer: LayerWeights, rng: np.random.Generator) -> None:
    x = tokens(rng, layer)
    inputs, weight, output = rotated(layer, x), inner_matrix(layer), output_matrix(layer)
    # The bound of the inner product, and as much again for each side's rotation, carried through the absolute output matrix.
    bound = 3 * (tolerances.float_product(np.abs(inputs) + np.abs(x).max(), weight) @ np.abs(output))
    if layer.code == "split":
        # Scale and offset parts may cancel in the weight, but are rounded apart: bound them apart.
        bound = bound + 3 * 2.0**-24 * layer.in_features * (np.abs(x).sum(axis=1, keepdims=True) * 4)
    error = np.abs(run(layer, x, "float") - inputs @ weight.T @ output)
    assert (error <= bound).all()
    assert np.abs(inputs @ weight.T @ output).max() > 100 * bound.max() or layer.in_features > 1000


def test_int8_activations_equal_the_dense_product_of_rounded_inputs(layer: LayerWeights, rng: np.random.Generator) -> None:
    x = tokens(rng, layer)
    segment = layer.segment
    with np.errstate(all="raise"):
        inputs = rotated(layer, x).astype(np.float32)
    xq, xscale = reference.quantize_activations(inputs, segment)
    rounded = xq * np.repeat(xscale.astype(np.float64), segment, axis=1)[:, : layer.in_features]
    exact = rounded @ inner_matrix(layer).T @ output_matrix(layer)
    y = run(layer, x, "int8")
    # The float32 rotation of the kernel may round an input to the neighbouring integer: allow that for one input in fifty.
    step = (xscale.max() * np.abs(inner_matrix(layer)).max(axis=1)) @ np.abs(output_matrix(layer))
    assert (np.abs(y - exact) <= step * (1 + layer.in_features // 50) + 1e-3 * np.abs(exact)).all()


def test_a_batch_is_its_tokens(layer: LayerWeights, rng: np.random.Generator) -> None:
    x = tokens(rng, layer)
    y = run(layer, x, "int8")
    for index in range(len(x)):
        np.testing.assert_array_equal(run(layer, x[index : index + 1], "int8")[0], y[index])
    assert run(layer, x[:0], "int8").shape == (0, layer.out_features)


@pytest.mark.parametrize("activations", ["int8", "float"])
def test_nothing_from_nothing(layer: LayerWeights, activations: str, rng: np.random.Generator) -> None:
    assert not run(layer, np.zeros((2, layer.in_features), np.float32), activations).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other(layer: LayerWeights, bad: float, rng: np.random.Generator) -> None:
    x = tokens(rng, layer, 3)
    good = run(layer, x, "int8")
    x[1, layer.in_features // 2] = bad
    y = run(layer, x, "int8")
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[[0, 2]], good[[0, 2]])
    assert not np.isfinite(run(layer, x, "float")[1]).any()


def test_scaling_by_a_power_of_two_is_exact(layer: LayerWeights, rng: np.random.Generator) -> None:
    x = tokens(rng, layer)
    np.testing.assert_array_equal(run(layer, x * np.float32(8), "int8"), run(layer, x, "int8") * np.float32(8))


def test_preparing_changes_nothing(layer: LayerWeights) -> None:
    before = layer.packed.copy(), layer.scale.copy()
    prepared = reference.prepare(layer)
    assert prepared.scale.dtype == np.float32
    np.testing.assert_array_equal(layer.packed, before[0])
    np.testing.assert_array_equal(layer.scale, before[1])


def test_wrong_calls(rng: np.random.Generator) -> None:
    layer = reference.prepare(trellis_layer(rng, 7, 8, 8))
    x = np.zeros((1, 8), np.float32)
    with pytest.raises(OptionError, match="int8 or float"):
        reference.linear_trellis(x, layer, "int4")
    with pytest.raises(OptionError, match="call linear_trellis"):
        reference.linear_split(x, layer, "int8")
    for wrong in (x.astype(np.float64), x[0], x[:, :7]):
        with pytest.raises(ShapeError, match=r"float32 \[tokens, 8\]"):
            reference.linear_trellis(wrong, layer, "int8")


def test_block_segments_keep_a_massive_channel_to_itself(rng: np.random.Generator) -> None:
    """One scale per block: the other blocks keep their precision."""
    x = rng.standard_normal((1, 128)).astype(np.float32)
    x[0, 0] = 1000
    inputs = np.abs(rotated(trellis_layer(rng, 7, 64, 128, (32, 1)), x)).max()
    assert inputs > 10
    errors = {}
    for segment in ("token", "block"):
        layer = trellis_layer(np.random.default_rng(5), 7, 64, 128, (32, 1), activation_segment=segment)
        exact = rotated(layer, x) @ inner_matrix(layer).T @ output_matrix(layer)
        errors[segment] = np.abs(run(layer, x, "int8") - exact).mean()
    assert errors["block"] < errors["token"]


# ---- decoding ----


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_levels_of_every_slot(bits: int, rng: np.random.Generator) -> None:
    layer = trellis_layer(rng, bits, 130, 10)
    levels = reference.trellis_levels(layer.packed, bits)
    assert levels.dtype == np.int8 and levels.shape == (192, 12)
    np.testing.assert_array_equal(levels[:130, :10], inner_matrix(layer))


def test_fields_of_every_slot(rng: np.random.Generator) -> None:
    packed = rng.integers(0, 256, (2, 3 * 112)).astype(np.uint8)
    fields = reference.split_fields(packed)
    assert fields.dtype == np.uint8 and fields.shape == (128, 12)
    for row in range(2):
        for column in range(3):
            tile = int.from_bytes(packed[row, 112 * column : 112 * (column + 1)].tobytes(), "little")
            for pair in range(128):
                symbol = tile >> 7 * pair & 127
                n, k = 64 * row + pair // 2, 4 * column + 2 * (pair % 2)
                assert (fields[n, k], fields[n, k + 1]) == (symbol & 15, symbol >> 4)


def test_encoder_is_the_definition(rng: np.random.Generator) -> None:
    fixed = rng.integers(-200, 201, (2, 256)).astype(np.int16)
    np.testing.assert_array_equal(reference.trellis_encode(fixed, 7, threads=3), trellis.encode(fixed, 7))


# ---- products ----


@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 1, 1), (3, 70, 1023), (2, 65, 1025), (4, 5, 4100)])
@pytest.mark.parametrize("values", ["random", "extreme"])
def test_integer_products_are_exact(tokens: int, outputs: int, inputs: int, values: str, rng: np.random.Generator) -> None:
    x, weights = (rng.integers(-128, 128, (count, inputs)).astype(np.int8) for count in (tokens, outputs))
    if values == "extreme":
        # Sums beyond 2^24 that need their lowest bit, and the largest sum there is.
        x, weights = (np.maximum(array, np.int8(100)) for array in (x, weights))
        x[0], weights[0] = -128, -128
    got = integer_product(x, weights)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, x.astype(np.int64) @ weights.astype(np.int64).T)


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("segment", [1, 2, 8, 10, 12, 64])
def test_trellis_products_step_by_step(bits: int, segment: int, rng: np.random.Generator) -> None:
    """Bit for bit the stated order of float32 steps."""
    layer = trellis_layer(rng, bits, 128, 12)
    levels = inner_matrix(layer).astype(np.int64)
    xq = rng.integers(-127, 128, (3, 12)).astype(np.int8)
    xscale = rng.standard_normal((3, -(-12 // segment))).astype(np.float32)
    accumulated = reference.trellis_accumulate(layer.packed, bits, xq)
    assert accumulated.dtype == np.int32
    np.testing.assert_array_equal(accumulated, xq.astype(np.int64) @ levels.T)
    product = reference.trellis_product(layer.packed, bits, xq, xscale, segment)
    for m in range(3):
        for n in range(128):
            y = np.float32(0)
            for s in range(xscale.shape[1]):
                part = slice(s * segment, (s + 1) * segment)
                y = y + xscale[m, s] * np.float32(int(xq[m, part].astype(np.int64) @ levels[n, part]))
            assert product[m, n] == y


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [4, 8, 12])
def test_split_products_step_by_step(symmetric: bool, group: int, rng: np.random.Generator) -> None:
    layer = split_layer(rng, 66, 12, "group", symmetric, group)
    fields = reference.split_fields(layer.packed)[:66].astype(np.int64)
    scale, offset = layer.scale.astype(np.float32), None if symmetric else layer.offset.astype(np.float32)
    xq = rng.integers(-127, 128, (2, 12)).astype(np.int8)
    xscale = rng.standard_normal((2, -(-12 // group))).astype(np.float32)
    product = reference.split_product(layer.packed, scale, offset, xq, xscale, group, 66)
    for m in range(2):
        for n in range(66):
            y = np.float32(0)
            for g in range(xscale.shape[1]):
                part = slice(g * group, (g + 1) * group)
                x, q = xq[m, part].astype(np.int64), fields[n, part]
                sums = [int(x[field::2] @ (q[field::2] - ((8, 4)[field] if symmetric else 0))) for field in (0, 1)]
                t = scale[n, 2 * g] * np.float32(sums[0])
                t = t + scale[n, 2 * g + 1] * np.float32(sums[1])
                if not symmetric:
                    t = t + offset[n, 2 * g] * np.float32(x[0::2].sum())
                    t = t + offset[n, 2 * g + 1] * np.float32(x[1::2].sum())
                y = y + xscale[m, g] * t
            assert product[m, n] == y


def test_int8_products_step_by_step(rng: np.random.Generator) -> None:
    layer = int8_layer(rng, 5, 7)
    xq = rng.integers(-127, 128, (3, 7)).astype(np.int8)
    xscale, scale = rng.standard_normal((3, 1)).astype(np.float32), layer.scale.astype(np.float32)
    product = reference.int8_product(layer.packed, scale, xq, xscale)
    exact = (xq.astype(np.int64) @ layer.packed.astype(np.int64).T).astype(np.float32)
    for m in range(3):
        for n in range(5):
            assert product[m, n] == scale[n] * (xscale[m, 0] * exact[m, n])


def test_products_reject_wrong_scales_and_sizes(rng: np.random.Generator) -> None:
    layer, x = trellis_layer(rng, 7, 64, 8), np.zeros((2, 8), np.int8)
    assert tile_grid(64, 8) == (1, 2)
    with pytest.raises(ShapeError, match="activation scales"):
        reference.trellis_product(layer.packed, 7, x, np.zeros((2, 1), np.float32), 4)
    with pytest.raises(ShapeError, match=r"\[tokens, 8\]"):
        reference.trellis_accumulate(layer.packed, 7, x[:, :4])
    with pytest.raises(ShapeError, match="scales must have 4 columns"):
        reference.split_product(layer.packed, np.ones((64, 2), np.float32), None, x, np.ones((2, 2), np.float32), 4, 64)


# ---- activations ----


@pytest.mark.parametrize("block", [1, 2, 4, 32, 256])
def test_hadamard_is_the_sylvester_matrix(block: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 512)).astype(np.float32)
    y = reference.hadamard(x, block)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, x.astype(np.float64) @ sylvester(512, block), rtol=0, atol=2e-6)
    np.testing.assert_allclose(reference.hadamard(y, block), x, rtol=0, atol=2e-6)
    integers = np.rint(x * 100)
    power = int(block).bit_length() - 1
    if power % 2 == 0:  # 1/sqrt(block) is a power of two, so integers stay exact
        np.testing.assert_array_equal(reference.hadamard(integers, block), integers.astype(np.float64) @ sylvester(512, block))


@pytest.mark.parametrize("block", [0, -2, 3, 6, 8])
def test_hadamard_rejects_other_blocks(block: int) -> None:
    with pytest.raises(ShapeError, match="power of two that divides 12"):
        reference.hadamard(np.zeros((1, 12), np.float32), block)
