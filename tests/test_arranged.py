"""Layers whose weights were copied in an instruction set's own order: the same bits as those in the stored order."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest

import layers
from native_cases import SETS, equal, native
from needs import needs, program
from septet import _native
from septet.errors import ShapeError
from septet.kernels import LayerWeights, fortran_library, reference
from variants import chosen, variants

#: outputs, inputs, size of the input blocks; the first three are groups of four tiles, one or odd numbers of rows.
SIZES = [(64, 16, 16), (70, 576, 64), (320, 2064, 16), (65, 130, 2), (64, 60, 4), (64, 24, 8)]
#: SEPTET_OK, SEPTET_ERROR_NULL and SEPTET_ERROR_CODE of septet.h.
OK, NULL, CODE = 0, 1, 6
SETS_WITH_AN_ORDER = [name for name in ("avx2", "avxvnni", "avx512vbmi", "amx") if name in SETS]
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 130)


def trellis(rng: np.random.Generator, bits: int, size: tuple[int, int, int], segment: str) -> LayerWeights:
    outputs, inputs, block = size
    return layers.trellis_layer(rng, bits, outputs, inputs, (block, 2 if outputs % 2 == 0 else 1), activation_segment=segment)


def run(layer: object, x: np.ndarray, activations: str = "int8", threads: int = 2) -> np.ndarray:
    return native.linear_trellis(x, layer, activations, threads)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("segment", ["token", "block"])
@pytest.mark.parametrize("bits", [6, 7, 8])
def test_same_bits_as_the_stored_order(rng: np.random.Generator, name: str, segment: str, bits: int) -> None:
    with chosen("native", name):
        for size in SIZES:
            layer = trellis(rng, bits, size, segment)
            stored, arranged, known = native.prepare(layer), native.prepare(layer, arrange=True), reference.prepare(layer)
            for tokens in TOKENS:
                x = rng.standard_normal((tokens, size[1])).astype(np.float32)
                equal(run(arranged, x), run(stored, x))
                equal(run(arranged, x, "float"), run(stored, x, "float"))
                if tokens in (1, 5):
                    equal(run(arranged, x), reference.linear_trellis(x, known, "int8"))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("segment", ["token", "block"])
def test_long_rows_and_every_activation(rng: np.random.Generator, name: str, segment: str) -> None:
    """More inputs than any buffer holds, the largest levels and sums, NaN and infinity."""
    layer = layers.trellis_layer(rng, 7, 192, 8192, (256, 64), activation_segment=segment)
    with chosen("native", name):
        arranged, stored = native.prepare(layer, arrange=True), native.prepare(layer)
        for tokens in (1, 3, 8, 20):
            x = rng.standard_normal((tokens, 8192)).astype(np.float32)
            equal(run(arranged, np.sign(x)), run(stored, np.sign(x)))
            x[tokens // 2, 5000] = np.nan
            x[tokens // 3, 300] = -np.inf
            equal(run(arranged, x), run(stored, x))


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("block", [1, 64, 256, 512, 2048])
def test_outputs_are_finished_wherever_their_blocks_end(rng: np.random.Generator, block: int, name: str) -> None:
    layer = layers.trellis_layer(rng, 7, 6144, 512, (256, block))
    x = rng.standard_normal((1, 512)).astype(np.float32)
    with chosen("native", name):
        wanted = run(native.prepare(layer), x)
        arranged = native.prepare(layer, arrange=True)
        for threads in (1, 2, 3):
            equal(native.linear_trellis(x, arranged, "int8", threads), wanted)


@pytest.mark.parametrize("name", SETS)
def test_another_set_changes_nothing_later(rng: np.random.Generator, name: str) -> None:
    layer = layers.trellis_layer(rng, 7, 128, 256, (256, 64), activation_segment="block")
    x = rng.standard_normal((5, 256)).astype(np.float32)
    with chosen("native", name):
        arranged = native.prepare(layer, arrange=True)
    wanted = run(native.prepare(layer), x)
    for other in SETS:
        with chosen("native", other):
            equal(run(arranged, x), wanted)


def test_the_copy_stands_alone_and_moves_as_it_is(rng: np.random.Generator) -> None:
    layer = layers.trellis_layer(rng, 7, 128, 256, (256, 64))
    x = rng.standard_normal((2, 256)).astype(np.float32)
    arranged = native.prepare(layer, arrange=True)
    wanted = run(arranged, x)
    layer.packed[:] = 0
    equal(run(arranged, x), wanted)
    memory = np.zeros(layer.packed.nbytes, np.uint8)
    again = arranged.kernel.arranged(memory)
    equal(again.linear(x, False, 1), wanted)
    with pytest.raises(ShapeError, match="as many bytes"):
        arranged.kernel.arranged(memory[:-1])


@pytest.mark.parametrize("code", ["split", "int8"])
def test_other_codes_are_copied(rng: np.random.Generator, code: str) -> None:
    layer = layers.split_layer(rng, 64, 64) if code == "split" else layers.int8_layer(rng, 64, 64, 64)
    linear = getattr(native, f"linear_{code}")
    x = rng.standard_normal((3, 64)).astype(np.float32)
    wanted = linear(x, native.prepare(layer), "int8")
    memory = np.empty(layer.packed.nbytes, np.uint8)
    copied = native.prepare(layer).kernel.arranged(memory)
    assert memory.tobytes() == layer.packed.tobytes()
    equal(copied.linear(x, False, 1), wanted)


@pytest.mark.parametrize("code", ["trellis", "split", "int8"])
@needs("fortran", "above, the order is tested in C++")
@pytest.mark.parametrize("compiler", variants("fortran") or [""])
def test_fortran_has_one_order(rng: np.random.Generator, compiler: str, code: str) -> None:
    from septet.kernels import fortran

    make = {
        "trellis": lambda: trellis(rng, 6, SIZES[1], "block"),
        "split": lambda: layers.split_layer(rng, 70, 66),
        "int8": lambda: layers.int8_layer(rng, 7, 64, 64),
    }
    layer = make[code]()
    memory = np.zeros(layer.packed.nbytes, np.uint8)
    library = fortran_library.open_library(compiler)[1]
    structure = fortran.prepare(layer).structure
    to = ctypes.c_void_p(memory.ctypes.data)
    assert library.septet_arrange(ctypes.byref(structure), None) == NULL
    assert library.septet_arrange(ctypes.byref(structure), to) == OK
    assert structure.weight == memory.ctypes.data and not structure.arranged_for
    assert memory.tobytes() == layer.packed.tobytes()
    structure.arranged_for = memory.ctypes.data
    assert library.septet_arrange(ctypes.byref(structure), to) == CODE


@needs("avx2", "the first one with an order of its own; without, layers keep the stored one, which all tests above compare with")
@pytest.mark.parametrize("name", SETS_WITH_AN_ORDER or [""])
def test_the_order_is_the_documented_one(rng: np.random.Generator, name: str) -> None:
    """Per group of four tiles, uint16 [tile][half of strands][strand][word] -> [word][strand][half][tile]; no byte more or less."""
    layer = layers.trellis_layer(rng, 7, 128, 64, (64, 64))
    memory = np.empty(layer.packed.nbytes, np.uint8)
    with chosen("native", name):
        native.prepare(layer).kernel.arranged(memory)
    words = layer.packed.view("<u2").reshape(-1, 4, 2, 4, 7).transpose(0, 4, 3, 2, 1)
    np.testing.assert_array_equal(memory, np.ascontiguousarray(words).view(np.uint8).reshape(-1))


def test_an_engine_keeps_its_set(tmp_path: Path, rng: np.random.Generator) -> None:
    import engine_models
    from septet.engine import Engine

    directory = engine_models.quantized("llama-bias", tmp_path, head="trellis")
    text = rng.integers(0, engine_models.VOCABULARY, 40).tolist()
    engine = Engine.load(directory, "int8")
    wanted = engine.logits(text)
    for name in SETS:
        with chosen("native", name):
            engine.reset()
            equal(engine.logits(text), wanted)
    assert _native.instruction_set() == SETS[-1]


@needs("avx512vbmi", "the loops are its instructions; above, all sets of this machine are compared")
def test_loops_for_other_cores_give_the_same_bits(tmp_path: Path) -> None:
    source, cmake = Path(__file__).parent.parent / "native", program("cmake")
    assert cmake is not None, "cmake must be on the path or beside the interpreter: make test installs it"
    for command in (
        [cmake, "-S", source, "-B", tmp_path, "-DSEPTET_OPTIMIZE=-O1"],
        [cmake, "--build", tmp_path, "--target", "compare_cores"],
        [tmp_path / "compare_cores"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
