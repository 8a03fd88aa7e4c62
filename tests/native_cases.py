"""What the tests of the compiled kernels, C++ and Fortran, share: sizes, random operands, and bit-for-bit comparison."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest

from septet.kernels import fortran_library, select_backend
from variants import chosen, variants

#: Every build that compiled kernels have here: (backend, instruction set or compiler).
BUILDS = [(backend, variant) for backend in ("native", "fortran") for variant in variants(backend)]
SETS = variants("native")


class Compiled:
    """The backend of the build that the fixture below has chosen, and its C functions."""

    module: ModuleType

    def __getattr__(self, name: str) -> object:
        return getattr(self.module, name)

    def library(self) -> ctypes.CDLL:
        """The library with the functions of include/septet.h."""
        if self.module.NAME == "fortran":
            return fortran_library.open_library(self.module.compiler())[1]
        return ctypes.CDLL(self.module._native.__file__)


native = Compiled()
native.module = select_backend("native")
#: outputs, inputs
SIZES = [(1, 1), (3, 5), (64, 4), (65, 130), (130, 64), (192, 576), (64, 2048), (70, 1027)]
BATCHES = range(1, 18)


@pytest.fixture(params=BUILDS, ids="-".join)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with each build; import it where `usefixtures` names it."""
    with chosen(*request.param) as native.module:
        yield request.param[1]
    native.module = select_backend("native")


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
