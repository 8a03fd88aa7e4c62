"""The compiled kernels equal the reference bit for bit: C++ in every instruction set, Fortran from every compiler that is here.

Float activations are the exception: their order of additions is open, so they are held to the bound in `tolerances`.
"""

from __future__ import annotations

import numpy as np
import pytest

import tolerances
from native_cases import BATCHES, SIZES, equal, instruction_set, native, padded, random_int8, random_packed  # noqa: F401
from septet.kernels import reference

pytestmark = pytest.mark.usefixtures("instruction_set")


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("size", SIZES)
def test_decoding(rng: np.random.Generator, size: tuple[int, int], bits: int) -> None:
    packed = random_packed(rng, *size, bits)
    equal(native.unpack(packed, bits), reference.unpack(packed, bits))
    equal(native.pack(native.unpack(packed, bits), bits), packed)
    equal(native.trellis_levels(packed, bits), reference.trellis_levels(packed, bits))
    if bits == 7:
        equal(native.split_fields(packed), reference.split_fields(packed))


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_every_window_in_every_place(bits: int) -> None:
    """All 65536 windows at each of the 128 pairs, also round the end of a tile; 42 windows side by side in a tile do not overlap."""
    tiles, wide = np.arange(1 << 16), 3
    for first in (0, 1, 2, 126, 127):
        places = (first + wide * np.arange(128 // wide)) % 128
        windows = (tiles[:, None] + 1597 * places) % (1 << 16)
        symbols = np.zeros((1 << 16, 128), np.uint8)
        for part in range(-(-16 // bits)):
            symbols[:, (places + part) % 128] = windows >> bits * part & (1 << bits) - 1
        levels = native.trellis_levels(native.pack(symbols.reshape(4, -1, 128), bits), bits)
        pairs = levels.reshape(4, 64, -1, 2, 2).transpose(0, 2, 1, 3, 4).reshape(1 << 16, 128, 2)
        np.testing.assert_array_equal(pairs[:, places], reference.trellis.window_levels(bits)[windows])


def test_every_split_symbol_in_every_place(rng: np.random.Generator) -> None:
    """All 128 symbols at each of the 128 pairs of a tile, decoded and multiplied with 4 and 3 bits apart."""
    symbols = ((np.arange(128)[:, None] + np.arange(128)) % 128).astype(np.uint8)[None]
    packed = native.pack(symbols, 7)
    equal(native.split_fields(packed), reference.split_fields(packed))
    xq, ones = random_int8(rng, 3, 512), np.ones((3, 1), np.float32)
    for steps in ((1, 0), (0, 1)):
        arguments = packed, np.array([steps], np.float32), None, xq, ones, 512, 64
        equal(native.split_product(*arguments), reference.split_product(*arguments))


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("tokens", BATCHES)
def test_accumulate(rng: np.random.Generator, tokens: int, bits: int) -> None:
    for outputs, inputs in SIZES:
        packed = random_packed(rng, outputs, inputs, bits)
        xq = random_int8(rng, tokens, padded(inputs))
        equal(native.trellis_accumulate(packed, bits, xq), reference.trellis_accumulate(packed, bits, xq))


def test_long_sums_do_not_overflow() -> None:
    """28672 inputs of one sign meet the largest level: the sum of the unsigned operands passes 2^30."""
    window = int(np.argmax(reference.trellis.window_levels(8).astype(int).sum(axis=1)))
    packed = np.tile(np.array([window & 255, window >> 8], np.uint8), (1, 7168 * 64))
    for value in (127, -128):
        xq = np.full((2, 28672), value, np.int8)
        equal(native.trellis_accumulate(packed, 8, xq), reference.trellis_accumulate(packed, 8, xq))


def test_long_split_sums_do_not_overflow() -> None:
    """28672 inputs of one sign meet the largest fields, 15 and 7: every sum is 14336 times one product."""
    packed, scales = np.full((1, 7168 * 112), 255, np.uint8), np.ones((1, 1), np.float32)
    for value in (127, -128):
        xq = np.full((1, 28672), value, np.int8)
        for steps, field in (((1, 0), 15), ((0, 1), 7)):
            found = native.split_product(packed, np.array([steps], np.float32), None, xq, scales, 28672, 64)
            zero_point = 8 if field == 15 else 4
            equal(found, np.full((1, 64), (field - zero_point) * 14336 * value, np.float32))


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_products_with_every_window(rng: np.random.Generator, bits: int) -> None:
    """All 65536 windows, 42 in a tile side by side, times activations of both signs: the sums of the definition, exactly."""
    places = 3 * np.arange(42)
    windows = (np.arange(4 * 391 * 42) % (1 << 16)).reshape(-1, 42)
    assert len(np.unique(windows)) == 1 << 16
    symbols = np.zeros((len(windows), 128), np.uint8)
    for part in range(3):
        symbols[:, places + part] = windows >> bits * part & (1 << bits) - 1
    packed = native.pack(symbols.reshape(4, 391, 128), bits)
    levels = reference.trellis_levels(packed, bits)
    pairs = levels.reshape(4, 64, 391, 2, 2).transpose(0, 2, 1, 3, 4).reshape(-1, 128, 2)
    np.testing.assert_array_equal(pairs[:, places], reference.trellis.window_levels(bits)[windows])
    xq = random_int8(rng, 3, 391 * 4)
    xq[1] = -128
    wanted = (xq.astype(np.int64) @ levels.astype(np.int64).T).astype(np.int32)
    assert (wanted < 0).any()
    equal(native.trellis_accumulate(packed, bits, xq), wanted)
    ones = np.ones((3, 1), np.float32)
    equal(native.trellis_product(packed, bits, xq, ones, 391 * 4), wanted.astype(np.float32))


@pytest.mark.parametrize("bits", [6, 7, 8])
@pytest.mark.parametrize("segment", [1, 2, 4, 10, 64, 256, 4096])
def test_trellis_product(rng: np.random.Generator, segment: int, bits: int) -> None:
    for (outputs, inputs), tokens in zip(SIZES, (1, 2, 3, 4, 5, 6, 17, 140)):
        features = padded(inputs)
        packed = random_packed(rng, outputs, inputs, bits)
        xq = random_int8(rng, tokens, features)
        xscale = rng.random((tokens, -(-features // segment)), np.float32)
        equal(native.trellis_product(packed, bits, xq, xscale, segment), reference.trellis_product(packed, bits, xq, xscale, segment))


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("group", [4, 64, 128, 100000])
def test_split_product(rng: np.random.Generator, group: int, offsets: bool) -> None:
    for (outputs, inputs), tokens in zip(SIZES, (1, 2, 3, 4, 5, 6, 17, 70)):
        features = padded(inputs)
        segment = min(group, features)
        groups = -(-features // segment)
        packed = random_packed(rng, outputs, inputs, 7)
        scale = rng.random((1 if tokens == 4 else outputs, 2 * groups), np.float32)
        offset = rng.standard_normal(scale.shape, np.float32) if offsets else None
        xq = random_int8(rng, tokens, features)
        arguments = packed, scale, offset, xq, rng.random((tokens, groups), np.float32), segment, outputs
        equal(native.split_product(*arguments), reference.split_product(*arguments))


@pytest.mark.parametrize("tokens", BATCHES)
def test_int8_product(rng: np.random.Generator, tokens: int) -> None:
    for outputs, inputs in [*SIZES, (5, 63), (66, 64), (9, 65), (3, 191), (130, 256)]:
        weight, xq = random_int8(rng, outputs, inputs), random_int8(rng, tokens, inputs)
        scale, xscale = rng.random(outputs, np.float32), rng.random((tokens, 1), np.float32)
        equal(native.int8_product(weight, scale, xq, xscale), reference.int8_product(weight, scale, xq, xscale))


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 7, 17, 130])
def test_float_products_stay_within_the_bound(rng: np.random.Generator, tokens: int) -> None:
    for outputs, inputs in SIZES:
        x = rng.standard_normal((tokens, padded(inputs))).astype(np.float32)
        packed = random_packed(rng, outputs, inputs, 7)
        within(native.trellis_product_float(packed, 7, x), x, reference.trellis_levels(packed, 7))
        group = 16
        scale = rng.random((outputs, 2 * -(-x.shape[1] // group))).astype(np.float16).astype(np.float32)
        for offset in (None, -7 * scale):
            weight = split_weights(packed, scale, offset, group)
            within(native.split_product_float(packed, scale, offset, x, group, outputs), x, weight)
        rows = random_int8(rng, outputs, inputs)
        row_scale = rng.random(outputs, np.float32)
        x = np.ascontiguousarray(x[:, :inputs])
        within(native.int8_product_float(rows, row_scale, x), x, row_scale[:, None].astype(np.float64) * rows)


def within(found: np.ndarray, x: np.ndarray, weight: np.ndarray) -> None:
    assert found.dtype == np.float32
    error = np.abs(found - x.astype(np.float64) @ weight.astype(np.float64).T)
    assert (error <= tolerances.float_product(x, weight)).all()


def split_weights(packed: np.ndarray, scale: np.ndarray, offset: np.ndarray | None, group: int) -> np.ndarray:
    """float64 [N, K]."""
    fields = reference.split_fields(packed)[: len(scale)].astype(np.float64)
    columns = np.arange(fields.shape[1])
    field = 2 * (columns // group) + columns % 2
    if offset is None:
        return scale.astype(np.float64)[:, field] * (fields - reference.split.zero_points(fields.shape[1]))
    return scale.astype(np.float64)[:, field] * fields + offset[:, field]


@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024])
def test_hadamard(rng: np.random.Generator, block: int) -> None:
    x = rng.standard_normal((3, 5 * block)).astype(np.float32) * 10.0 ** rng.integers(-30, 30, (3, 5 * block)).astype(np.float32)
    x[0, 0] = -0.0
    equal(native.hadamard(x, block), reference.hadamard(x, block))
    small = np.zeros((2, 3 * block), np.float32)
    small[1] = -0.0
    equal(native.hadamard(small, block), reference.hadamard(small, block))


@pytest.mark.parametrize("segment", [1, 3, 16, 37, 64, 256, 1000])
def test_quantize_activations(rng: np.random.Generator, segment: int) -> None:
    for features in (1, 15, 64, 300, 576):
        x = rng.standard_normal((12, features)).astype(np.float32)
        x[1] = 0
        x[2] *= np.float32(2.0**-101)
        x[3] *= np.float32(1e-44)
        x[4] *= np.float32(1e38)
        x[5, -1] = np.nan
        x[6, 0] = np.inf
        x[7, 0] = -np.inf
        x[8] = rng.integers(-127, 128, features)  # halves: 127 / 254 of a step
        x[8, 0] = 254
        x[9] = 2.0**-100
        x[10] = -x[10]
        for found, wanted in zip(native.quantize_activations(x, segment), reference.quantize_activations(x, segment)):
            equal(found, wanted)


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_encode(rng: np.random.Generator, bits: int) -> None:
    fixed = np.clip(rng.standard_normal((6, 256)) * 160, -1020, 1020).astype(np.int16)
    wanted = reference.trellis_encode(fixed, bits)
    for threads in (1, 2, 3):
        equal(native.trellis_encode(fixed, bits, threads), wanted)
