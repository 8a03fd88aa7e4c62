"""The C functions about whole models: what they refuse, and that they touch their arrays only."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from septet import _native
from septet.errors import CheckpointError, OptionError, ShapeError
from septet.kernels import native
from septet.kernels.fortran_library import Layer
from test_native_interface import Guarded

LIBRARY = ctypes.CDLL(_native.__file__)

NULL, SIZE, CODE, INCOMPLETE, TOKEN, CONTEXT = 1, 2, 6, 12, 13, 14
INT8, FLOAT32 = 2, 3
HIDDEN, INTERMEDIATE, VOCABULARY = 8, 12, 10
SIZES = {
    "layers": 1,
    "hidden": HIDDEN,
    "intermediate": INTERMEDIATE,
    "heads": 2,
    "kv_heads": 1,
    "head_dim": 4,
    "vocabulary": VOCABULARY,
    "context": 20,
}
EMBEDDING, HEAD, QKV, OUT, GATE_UP, DOWN = range(6)
FREQUENCIES, FINAL_NORM, ATTENTION_NORM, MLP_NORM, Q_NORM = range(5)


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        ("epsilon", ctypes.c_float),
        ("activations", ctypes.c_int),
        ("cache", ctypes.c_int),
    ]  # fmt: skip


def shape(epsilon: float = 1e-5, activations: int = 1, cache: int = FLOAT32, **sizes: int) -> Shape:
    return Shape(**{**SIZES, **sizes}, epsilon=epsilon, activations=activations, cache=cache)


def create(given: Shape) -> ctypes.c_void_p:
    engine = ctypes.c_void_p()
    assert LIBRARY.septet_engine_create(ctypes.byref(given), ctypes.byref(engine)) == 0
    return engine


def dense(matrix: np.ndarray) -> Layer:
    """float32 [N, K], which the caller keeps alive."""
    return Layer(FLOAT32, 16, matrix.shape[1], matrix.shape[0], matrix.ctypes.data, None, None, None, 1, 1, 0, 0)


def set_weights(engine: ctypes.c_void_p, slot: int, layers: list[Layer], at: int = 0) -> int:
    pointers = (ctypes.POINTER(Layer) * len(layers))(*(ctypes.pointer(layer) for layer in layers))
    return LIBRARY.septet_engine_set_weights(engine, slot, ctypes.c_int64(at), pointers, len(layers))


def set_vector(engine: ctypes.c_void_p, slot: int, values: np.ndarray, at: int = 0) -> int:
    pointer = ctypes.c_void_p(values.ctypes.data)
    return LIBRARY.septet_engine_set_vector(engine, slot, ctypes.c_int64(at), pointer, ctypes.c_int64(len(values)))


def run(engine: ctypes.c_void_p, tokens: np.ndarray, wanted: int, logits: np.ndarray, text: int = 0) -> int:
    arrays = (ctypes.c_void_p(array.ctypes.data) for array in (tokens, logits))
    numbers = [ctypes.c_int64(number) for number in (text, len(tokens), wanted)]
    return LIBRARY.septet_engine_run(engine, numbers[0], next(arrays), *numbers[1:], next(arrays), 1)


def fill(engine: ctypes.c_void_p, guarded: Guarded, rng: np.random.Generator) -> None:
    """Random dense weights that lie beside forbidden pages."""

    def matrix(outputs: int, inputs: int) -> Layer:
        return dense(guarded.copy(rng.standard_normal((outputs, inputs)).astype(np.float32)))

    assert set_weights(engine, EMBEDDING, [matrix(VOCABULARY, HIDDEN)]) == 0
    assert set_weights(engine, QKV, [matrix(8, HIDDEN), matrix(4, HIDDEN), matrix(4, HIDDEN)]) == 0
    assert set_weights(engine, OUT, [matrix(HIDDEN, 8)]) == 0
    assert set_weights(engine, GATE_UP, [matrix(INTERMEDIATE, HIDDEN), matrix(INTERMEDIATE, HIDDEN)]) == 0
    assert set_weights(engine, DOWN, [matrix(HIDDEN, INTERMEDIATE)]) == 0
    for slot, size in ((FREQUENCIES, 2), (FINAL_NORM, HIDDEN), (ATTENTION_NORM, HIDDEN), (MLP_NORM, HIDDEN)):
        assert set_vector(engine, slot, guarded.copy(rng.random(size, np.float32))) == 0


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
def test_a_run_touches_its_arrays_only(rng: np.random.Generator, at_end: bool) -> None:
    guarded, engine = Guarded(at_end), create(shape())
    fill(engine, guarded, rng)
    for count, wanted in ((3, 3), (1, 1), (5, 2), (4, 0)):
        tokens = guarded.copy(rng.integers(0, VOCABULARY, count).astype(np.int32))
        logits = guarded.empty((wanted, VOCABULARY), np.float32)
        assert run(engine, tokens, wanted, logits) == 0
        assert np.isfinite(logits).all() and (wanted == 0 or np.abs(logits).min() > 0)
    LIBRARY.septet_engine_free(engine)


def test_an_engine_copies_what_it_is_given(rng: np.random.Generator) -> None:
    engine, tokens = create(shape()), np.array([1, 2], np.int32)
    guarded = Guarded(True)
    fill(engine, guarded, rng)
    before, after = np.empty((2, 2, VOCABULARY), np.float32)
    assert run(engine, tokens, 2, before) == 0
    for area in guarded.maps:
        np.frombuffer(area, np.uint8)[4096:-4096] = 0xFF
    assert LIBRARY.septet_engine_truncate(engine, ctypes.c_int64(0), ctypes.c_int64(0)) == 0
    assert run(engine, tokens, 2, after) == 0
    np.testing.assert_array_equal(before, after)
    LIBRARY.septet_engine_free(engine)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        *(({name: 0}, SIZE) for name in SIZES),
        *(({name: 1 << 60}, SIZE) for name in SIZES),
        ({"head_dim": 5}, SIZE),
        ({"head_dim": 258}, SIZE),
        ({"heads": 3, "kv_heads": 2}, SIZE),
        ({"epsilon": 0.0}, SIZE),
        ({"epsilon": float("nan")}, SIZE),
        ({"activations": 2}, CODE),
        ({"cache": 5}, CODE),
    ],
)
def test_shapes_are_checked(changes: dict, error: int) -> None:
    engine = ctypes.c_void_p()
    assert LIBRARY.septet_engine_create(ctypes.byref(shape(**changes)), ctypes.byref(engine)) == error
    assert engine.value is None


def test_weights_and_vectors_are_checked(rng: np.random.Generator) -> None:
    engine, wide = create(shape()), np.zeros((VOCABULARY, HIDDEN), np.float32)
    good = dense(wide)
    assert LIBRARY.septet_engine_create(None, ctypes.byref(engine)) == NULL
    assert set_weights(engine, EMBEDDING, [good, good]) == SIZE
    assert set_weights(engine, 6, [good]) == SIZE and set_weights(engine, -1, [good]) == SIZE
    assert set_weights(engine, OUT, [good]) == SIZE
    assert set_weights(engine, DOWN, [dense(np.zeros((HIDDEN, INTERMEDIATE), np.float32))], at=1) == SIZE
    for field, value, error in (("weight", None, NULL), ("in_features", 1 << 40, SIZE), ("code", INT8, NULL)):
        wrong = dense(wide)
        setattr(wrong, field, value)
        assert set_weights(engine, EMBEDDING, [wrong]) == error
    unknown = Layer(9, 16, HIDDEN, VOCABULARY, wide.ctypes.data, wide.ctypes.data, None, None, 1, 1, 0, 0)
    assert set_weights(engine, EMBEDDING, [unknown]) == CODE
    tiled = Layer(1, 7, HIDDEN, VOCABULARY, wide.ctypes.data, wide.ctypes.data, None, None, 1, 1, 0, 0)
    assert set_weights(engine, EMBEDDING, [tiled]) == CODE
    vector = np.zeros(HIDDEN, np.float32)
    assert set_vector(engine, FINAL_NORM, vector[:-1]) == SIZE and set_vector(engine, 99, vector) == SIZE
    assert set_vector(engine, ATTENTION_NORM, vector, at=1) == SIZE and set_vector(engine, Q_NORM, vector) == SIZE
    assert LIBRARY.septet_engine_set_window(engine, ctypes.c_int64(0), ctypes.c_int64(-1)) == SIZE
    assert LIBRARY.septet_engine_set_vector(engine, FINAL_NORM, ctypes.c_int64(0), None, ctypes.c_int64(HIDDEN)) == NULL
    LIBRARY.septet_engine_free(engine)
    LIBRARY.septet_engine_free(None)


def test_runs_are_checked_and_change_nothing(rng: np.random.Generator) -> None:
    engine, logits = create(shape()), np.empty((2, VOCABULARY), np.float32)
    assert run(engine, np.array([1], np.int32), 1, logits) == INCOMPLETE
    fill(engine, Guarded(True), rng)
    assert run(engine, np.array([1, VOCABULARY], np.int32), 1, logits) == TOKEN
    assert run(engine, np.array([-1], np.int32), 1, logits) == TOKEN
    assert run(engine, np.zeros(21, np.int32), 1, logits) == CONTEXT
    assert run(engine, np.zeros(1, np.int32), 2, logits) == SIZE and run(engine, np.zeros(1, np.int32), -1, logits) == SIZE
    assert LIBRARY.septet_engine_run(engine, ctypes.c_int64(0), None, ctypes.c_int64(1), ctypes.c_int64(0), None, 1) == NULL
    assert LIBRARY.septet_engine_run(None, ctypes.c_int64(0), None, ctypes.c_int64(0), ctypes.c_int64(0), None, 1) == NULL
    length = ctypes.c_int64(-1)
    assert LIBRARY.septet_engine_length(engine, ctypes.c_int64(0), ctypes.byref(length)) == 0 and length.value == 0
    assert run(engine, np.zeros(20, np.int32), 1, logits) == 0 and run(engine, np.zeros(1, np.int32), 1, logits) == CONTEXT
    assert LIBRARY.septet_engine_truncate(engine, ctypes.c_int64(0), ctypes.c_int64(21)) == SIZE
    assert LIBRARY.septet_engine_truncate(engine, ctypes.c_int64(0), ctypes.c_int64(-1)) == SIZE
    assert [run(engine, np.zeros(1, np.int32), 1, logits, text) for text in (-1, 4096)] == [SIZE, SIZE]
    LIBRARY.septet_engine_free(engine)


def step(engine: ctypes.c_void_p, texts: list[int], tokens: list[int], logits: np.ndarray) -> int:
    numbers, ids = np.array(texts, np.int64), np.array(tokens, np.int32)
    arrays = [ctypes.c_void_p(array.ctypes.data) for array in (numbers, ids)]
    return LIBRARY.septet_engine_step(engine, *arrays, ctypes.c_int64(len(ids)), ctypes.c_void_p(logits.ctypes.data), 1)


def test_steps_of_several_texts_are_checked_and_change_nothing(rng: np.random.Generator) -> None:
    engine, guarded = create(shape()), Guarded(True)
    fill(engine, guarded, rng)
    logits = guarded.empty((2, VOCABULARY), np.float32)
    assert step(engine, [0], [1], logits) == SIZE  # nobody has used it
    for text in (0, 2):
        assert run(engine, np.array([1 + text, 2], np.int32), 0, logits, text) == 0
    for texts, tokens, error in (([0, 0], [1, 2], SIZE), ([0, 3], [1, 2], SIZE), ([-1], [1], SIZE), ([0, 2], [1, VOCABULARY], TOKEN)):
        assert step(engine, texts, tokens, logits) == error
    assert LIBRARY.septet_engine_step(engine, None, None, ctypes.c_int64(1), None, 1) == NULL
    assert step(engine, [2, 0], [5, 6], logits) == 0 and step(engine, [], [], logits) == 0
    alone = np.empty((1, VOCABULARY), np.float32)
    for row, (text, tokens) in zip(logits, ((4, [3, 2, 5]), (5, [1, 2, 6]))):
        assert run(engine, np.array(tokens, np.int32), 1, alone, text) == 0
        np.testing.assert_array_equal(row, alone[0])
    assert run(engine, np.zeros(17, np.int32), 0, logits, 2) == 0 and step(engine, [0, 2], [1, 1], logits) == CONTEXT
    LIBRARY.septet_engine_free(engine)


def test_the_module_raises_septet_errors() -> None:
    with pytest.raises(ShapeError, match="sizes must fit"):
        _native.Engine((1, 8, 12, 2, 1, 5, 10, 20), 1e-5, True, "float32")
    engine = _native.Engine(tuple(SIZES.values()), 1e-5, True, "float32")
    with pytest.raises(CheckpointError, match="all its weights"):
        engine.append(np.zeros(1, np.int32), 1)
    with pytest.raises(ShapeError, match="contiguous int32"):
        engine.append(np.zeros(1, np.int64), 1)
    with pytest.raises(OptionError, match="float32, float16 or bfloat16"):
        _native.Layer(np.zeros((2, 2), np.float32), "float8")


def test_reading_sums_every_byte(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, 100_003, np.uint8)
    wanted = (int(data[:100_000].view(np.uint64).sum(dtype=np.uint64)) + int(data[100_000:].sum())) % 2**64
    assert [native.read_sum(data, threads) for threads in (1, 2, 5)] == [wanted] * 3
    assert native.read_sum(data[:0]) == 0


def test_more_threads_than_shares_of_a_loop(rng: np.random.Generator) -> None:
    data = rng.integers(0, 256, 80 << 19, np.uint8)
    assert native.read_sum(data, 80) == int(data.view(np.uint64).sum(dtype=np.uint64))
