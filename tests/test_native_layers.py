"""Whole layers in C++ and Fortran: equal to the reference bit for bit, whatever the instruction set, compiler, threads or batch."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import layers
import tolerances
from native_cases import SIZES, equal, instruction_set, native  # noqa: F401
from septet.kernels import LayerWeights, reference

pytestmark = pytest.mark.usefixtures("instruction_set")

KINDS = [f"trellis-{bits}-{segment}" for bits in (6, 7, 8) for segment in ("token", "block")]
KINDS += [f"split-{granularity}-{kind}" for granularity in ("tensor", "channel", "group") for kind in ("symmetric", "offset")]
KINDS += ["int8"]


def make_layer(rng: np.random.Generator, kind: str, outputs: int, inputs: int) -> LayerWeights:
    """A random layer of a kind, with the largest rotation blocks up to 256."""
    code, *options = kind.split("-")
    blocks = min(inputs & -inputs, 256), min(outputs & -outputs, 256)
    if code == "trellis":
        return layers.trellis_layer(rng, int(options[0]), outputs, inputs, blocks, activation_segment=options[1])
    if code == "split":
        group_size = 64 if options[0] == "group" else None
        return layers.split_layer(rng, outputs, inputs, options[0], options[1] == "symmetric", group_size)
    return layers.int8_layer(rng, outputs, inputs, blocks[0])


def runs(layer: LayerWeights) -> tuple:
    """The whole layer natively and by the reference: functions of inputs, activations and (native) threads."""
    name = f"linear_{layer.code}"
    prepared, wanted = native.prepare(layer), reference.prepare(layer)

    def run(x: np.ndarray, activations: str, threads: int = 0) -> np.ndarray:
        return getattr(native, name)(x, prepared, activations, threads)

    return run, lambda x, activations: getattr(reference, name)(x, wanted, activations)


@pytest.mark.parametrize("kind", KINDS)
def test_int8_activations(rng: np.random.Generator, kind: str) -> None:
    for (outputs, inputs), tokens in zip([*SIZES, (192, 576), (192, 576)], (1, 2, 3, 4, 5, 6, 17, 1, 1, 300), strict=True):
        run, expected = runs(make_layer(rng, kind, outputs, inputs))
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        if tokens > 4:
            x[tokens // 2, inputs // 2] = np.nan
            x[tokens // 3, inputs // 3] = np.inf
        wanted = expected(x, "int8")
        equal(run(x, "int8"), wanted)
        assert tokens < 5 or np.isnan(wanted[tokens // 2]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_float_activations(rng: np.random.Generator, kind: str) -> None:
    for (outputs, inputs), tokens in zip(SIZES, (1, 2, 3, 4, 5, 6, 17, 1), strict=True):
        layer = make_layer(rng, kind, outputs, inputs)
        run, _ = runs(layer)
        x = rng.standard_normal((tokens, inputs)).astype(np.float32)
        rotated, inner, outer = layers.rotated(layer, x), layers.inner_matrix(layer), layers.output_matrix(layer)
        if layer.code == "int8":
            outer = np.diag(layer.scale.astype(np.float64))
        # The bound is twice what a product needs; that covers the rotations' roundings, a few units of what they add up.
        bound = tolerances.float_product(np.abs(rotated) + np.abs(rotated).max(axis=1, keepdims=True), inner) @ np.abs(outer)
        assert (np.abs(run(x, "float") - rotated @ inner.T @ outer) <= bound).all()


@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_matter(rng: np.random.Generator, kind: str) -> None:
    # Large enough that three threads are worth waking.
    run, _ = runs(make_layer(rng, kind, 1027, 1540))
    for tokens in (1, 3, 40):
        x = rng.standard_normal((tokens, 1540)).astype(np.float32)
        for activations in ("int8", "float"):
            results = {run(x, activations, threads).tobytes() for threads in (1, 2, 3, 7)}
            assert len(results) == 1


@pytest.mark.parametrize("block", [1, 64, 256, 512, 2048])
def test_outputs_are_finished_wherever_their_blocks_end(rng: np.random.Generator, block: int) -> None:
    """In the part of a thread where it ends with a block, else when all is there."""
    layer = layers.trellis_layer(rng, 7, 6144, 512, (256, block))
    run, expected = runs(layer)
    x = rng.standard_normal((1, 512)).astype(np.float32)
    for threads in (1, 2, 3):
        equal(run(x, "int8", threads), expected(x, "int8"))


def test_callers_in_several_threads(rng: np.random.Generator) -> None:
    """The pool serves one caller; the others work alone, and all get the same bytes."""
    run, _ = runs(make_layer(rng, "trellis-7-token", 1024, 2048))
    x = rng.standard_normal((2, 2048)).astype(np.float32)
    wanted = run(x, "int8", 1).tobytes()
    found: list[bool] = []

    def call() -> None:
        found.extend(run(x, "int8", 3).tobytes() == wanted for _ in range(20))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [True] * 80


@pytest.mark.parametrize("kind", ["trellis-7-token", "trellis-6-block", "split-group-offset", "int8"])
def test_a_batch_is_its_tokens(rng: np.random.Generator, kind: str) -> None:
    run, _ = runs(make_layer(rng, kind, 130, 516))
    for tokens in (2, 5, 11):
        x = rng.standard_normal((tokens, 516)).astype(np.float32)
        for activations in ("int8", "float"):
            together = run(x, activations)
            alone = [run(x[token : token + 1], activations) for token in range(tokens)]
            assert np.concatenate(alone).tobytes() == together.tobytes()


def test_no_tokens(rng: np.random.Generator) -> None:
    for kind in KINDS:
        run, _ = runs(make_layer(rng, kind, 65, 130))
        for activations in ("int8", "float"):
            assert run(np.zeros((0, 130), np.float32), activations).shape == (0, 65)


def test_prepare_does_not_copy_the_weights(rng: np.random.Generator) -> None:
    layer = make_layer(rng, "trellis-7-token", 64, 64)
    run, _ = runs(layer)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    before = run(x, "int8")
    layer.packed[:] = 255 - layer.packed
    assert (run(x, "int8") != before).any()
