"""The native kernels equal the reference bit for bit, in every instruction set that works here.

Float activations are the exception: their order of additions is open, so they are held to the bound in `tolerances`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tolerances

from septet.errors import BackendUnavailableError, CodeRangeError, OptionError, ShapeError
from septet.kernels import LayerWeights, reference

native = pytest.importorskip("septet.kernels.native", reason="the native extension is not built")

ROOT = Path(__file__).parent.parent
SETS = [name for name, obstacle in native.instruction_sets().items() if not obstacle]
#: outputs, inputs
SIZES = [(1, 1), (3, 5), (64, 4), (65, 130), (130, 64), (192, 576), (64, 2048), (70, 1027)]
BATCHES = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17]


@pytest.fixture(params=SETS, autouse=True)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test of this file with each instruction set."""
    native.set_instruction_set(request.param)
    assert native.instruction_set() == request.param
    yield request.param
    native.set_instruction_set(None)


def equal(found: np.ndarray, wanted: np.ndarray) -> None:
    """The same dtype, shape and bits; NaNs anywhere are equal."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)
    if found.dtype == np.float32:
        np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


def random_packed(rng: np.random.Generator, outputs: int, inputs: int, bits: int) -> np.ndarray:
    """Any bytes are valid packed weights."""
    return rng.integers(0, 256, (-(-outputs // 64), -(-inputs // 4) * 16 * bits), np.uint8)


def random_int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """All 256 values, with the smallest one more often than not by chance."""
    values = rng.integers(-128, 128, shape, np.int8)
    values[rng.random(shape) < 0.05] = -128
    return values


def padded(inputs: int) -> int:
    return -(-inputs // 4) * 4


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
def test_every_window_at_every_pair(bits: int) -> None:
    """Each of the 65536 windows at each of the 128 pairs: a tile of one repeated window, rotated to every pair."""
    step = 7919  # every tile holds many windows; together they cover all of them at all pairs
    rng = np.random.default_rng(step)
    symbols = rng.integers(0, 1 << bits, (1, 4096, 128), np.uint8)
    packed = reference.pack(symbols, bits)
    equal(native.trellis_levels(packed, bits), reference.trellis_levels(packed, bits))


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


def layer_of(rng: np.random.Generator, code: str, outputs: int, inputs: int, **options: object) -> LayerWeights:
    """A random layer."""
    given = SimpleNamespace(bits_per_pair=7, group_size=None, symmetric=False, activation_segment="token", cap=256, **{})
    vars(given).update(options)
    if code == "int8":
        packed, given.bits_per_pair = random_int8(rng, outputs, inputs), 16
    else:
        packed = random_packed(rng, outputs, inputs, given.bits_per_pair)

    def block(features: int) -> int:
        return min(features & -features, given.cap)

    def half(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float16)

    common = (code, given.bits_per_pair, inputs, outputs, packed)
    if code == "split":
        groups = 1 if given.group_size is None else -(-inputs // given.group_size)
        offset = None if given.symmetric else half(outputs, 2 * groups)
        return LayerWeights(*common, half(outputs, 2 * groups), offset, group_size=given.group_size)
    output_block = block(outputs) if code == "trellis" else 1
    return LayerWeights(
        *common, half(outputs), None, half(inputs), block(inputs), output_block, activation_segment=given.activation_segment
    )


LAYERS = [("trellis", {"bits_per_pair": bits, "activation_segment": segment}) for bits in (6, 7, 8) for segment in ("token", "block")]
LAYERS += [("split", {"symmetric": symmetric, "group_size": group}) for symmetric in (False, True) for group in (None, 64)]
LAYERS += [("int8", {})]


@pytest.mark.parametrize("code, options", LAYERS)
def test_linear(rng: np.random.Generator, code: str, options: dict[str, object]) -> None:
    for (outputs, inputs), tokens in zip([*SIZES, (192, 576), (192, 576)], (1, 2, 3, 4, 5, 6, 17, 1, 1, 300)):
        layer = layer_of(rng, code, outputs, inputs, **options)
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        x[tokens // 2, inputs // 2] = np.nan if tokens > 4 else 0
        run, prepared = getattr(native, f"linear_{code}"), native.prepare(layer)
        wanted = getattr(reference, f"linear_{code}")(x, reference.prepare(layer), "int8")
        equal(run(x, prepared, "int8"), wanted)
        assert not tokens > 4 or np.isnan(wanted).any()
        for threads in (2, 3):
            assert run(x, prepared, "int8", threads).tobytes() == run(x, prepared, "int8", 1).tobytes()
            assert run(x, prepared, "float", threads).tobytes() == run(x, prepared, "float", 1).tobytes()


@pytest.mark.parametrize("code, options", LAYERS)
def test_linear_with_float_activations(rng: np.random.Generator, code: str, options: dict[str, object]) -> None:
    for (outputs, inputs), tokens in zip(SIZES, (1, 2, 3, 4, 5, 6, 17, 1)):
        layer = layer_of(rng, code, outputs, inputs, **options)
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        found = getattr(native, f"linear_{code}")(x, native.prepare(layer), "float")
        wanted = getattr(reference, f"linear_{code}")(x, reference.prepare(layer), "float")
        # Both lie within the bound of the exact result; the rotations spread a column's error over its block.
        scale = np.abs(wanted).max() + np.sqrt(inputs) * 127 * np.abs(x).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4 * inputs * tolerances.FLOAT32_UNIT * scale)


def test_a_batch_is_its_tokens(rng: np.random.Generator) -> None:
    for code in ("trellis", "split", "int8"):
        layer = layer_of(rng, code, 130, 516)
        x = rng.standard_normal((11, 516)).astype(np.float32)
        run, prepared = getattr(native, f"linear_{code}"), native.prepare(layer)
        for activations in ("int8", "float"):
            together = run(x, prepared, activations)
            for token in range(11):
                assert run(x[token : token + 1], prepared, activations).tobytes() == together[token].tobytes()


def test_no_tokens(rng: np.random.Generator) -> None:
    layer = layer_of(rng, "trellis", 65, 130)
    assert native.linear_trellis(np.zeros((0, 130), np.float32), native.prepare(layer), "int8").shape == (0, 65)


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_encode(rng: np.random.Generator, bits: int) -> None:
    fixed = np.clip(rng.standard_normal((6, 256)) * 160, -1020, 1020).astype(np.int16)
    wanted = reference.trellis_encode(fixed, bits)
    for threads in (1, 2, 3):
        equal(native.trellis_encode(fixed, bits, threads), wanted)


def test_wrong_arguments_raise_septet_errors(rng: np.random.Generator) -> None:
    packed = random_packed(rng, 64, 8, 7)
    xq = random_int8(rng, 2, 8)
    with pytest.raises(OptionError, match="6, 7 or 8"):
        native.unpack(packed, 5)
    with pytest.raises(ShapeError, match="columns \\* 128"):
        native.unpack(packed, 8)
    with pytest.raises(CodeRangeError):
        native.pack(np.full((1, 1, 128), 128, np.uint8), 7)
    with pytest.raises(CodeRangeError):
        native.trellis_encode(np.full((1, 256), 1021, np.int16), 7)
    with pytest.raises(ShapeError, match="contiguous int8"):
        native.trellis_accumulate(packed, 7, xq.astype(np.int16))
    with pytest.raises(ShapeError, match="contiguous int8"):
        native.trellis_accumulate(packed, 7, np.asfortranarray(xq))
    with pytest.raises(ShapeError, match="contiguous int8"):
        native.trellis_accumulate(packed, 7, xq[:, :4])
    with pytest.raises(ShapeError, match="power of two"):
        native.hadamard(np.zeros((2, 6), np.float32), 4)
    with pytest.raises(OptionError, match="threads"):
        native.trellis_levels(packed, 7, -1)
    with pytest.raises(BackendUnavailableError, match="avx1024"):
        native.set_instruction_set("avx1024")
    layer = layer_of(rng, "trellis", 64, 8)
    with pytest.raises(OptionError, match="linear_trellis"):
        native.linear_split(np.zeros((1, 8), np.float32), native.prepare(layer), "int8")
    with pytest.raises(ShapeError, match=r"float32 \[any, 8\]"):
        native.linear_trellis(np.zeros((1, 9), np.float32), native.prepare(layer), "int8")
    with pytest.raises(ShapeError):
        native.prepare(SimpleNamespace(**{**dataclasses.asdict(layer), "packed": packed[:, 1:], "segment": 8}))


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_variables_are_obeyed_or_refused(instruction_set: str) -> None:
    show = "from septet import _native; print(_native.instruction_set(), _native.default_threads())"
    done = run_python(show, SEPTET_CPU=instruction_set, SEPTET_THREADS="3", OMP_NUM_THREADS="2")
    assert done.stdout.split() == [instruction_set, "3"]
    assert run_python(show, SEPTET_THREADS="", OMP_NUM_THREADS="2,1").stdout.split()[1] == "2"
    for variables in ({"SEPTET_CPU": "avx1024"}, {"SEPTET_THREADS": "many"}, {"SEPTET_THREADS": "0"}):
        done = run_python("import septet.kernels as k; k.select_backend()", **variables)
        assert done.returncode == 1 and next(iter(variables.values())) in done.stderr.splitlines()[-1]


def test_generated_tables_are_up_to_date() -> None:
    assert subprocess.run([sys.executable, "tools/generate_tables.py", "--check"], cwd=ROOT).returncode == 0
