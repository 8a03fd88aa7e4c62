"""What the tests of the native kernels share: sizes, random operands, and bit-for-bit comparison."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

native = pytest.importorskip("septet.kernels.native", reason="the native extension is not built")

SETS = [name for name, obstacle in native.instruction_sets().items() if not obstacle]
#: outputs, inputs
SIZES = [(1, 1), (3, 5), (64, 4), (65, 130), (130, 64), (192, 576), (64, 2048), (70, 1027)]
BATCHES = range(1, 18)


@pytest.fixture(params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with each instruction set; import it where `usefixtures` names it."""
    native.set_instruction_set(request.param)
    assert native.instruction_set() == request.param
    yield request.param
    native.set_instruction_set(None)


def equal(found: np.ndarray, wanted: np.ndarray) -> None:
    """The same dtype, shape and bits, zeros with their signs; every NaN equals every other."""
    assert found.dtype == wanted.dtype and found.shape == wanted.shape
    np.testing.assert_array_equal(found, wanted)
    if found.dtype == np.float32:
        number = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.signbit(found[number]), np.signbit(wanted[number]))


def random_packed(rng: np.random.Generator, outputs: int, inputs: int, bits: int) -> np.ndarray:
    """Any bytes are valid packed weights."""
    return rng.integers(0, 256, (-(-outputs // 64), -(-inputs // 4) * 16 * bits), np.uint8)


def random_int8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """All 256 values, the smallest one in every twentieth place."""
    values = rng.integers(-128, 128, shape, np.int8)
    values[rng.random(shape) < 0.05] = -128
    return values


def padded(inputs: int) -> int:
    """Inputs rounded up to whole tiles."""
    return -(-inputs // 4) * 4
