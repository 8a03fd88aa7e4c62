"""The shared library of the Fortran backend: found, opened and called.

The build makes one library per Fortran compiler it finds, `libseptet_fortran_<compiler>.so` beside the package's other files. All of
them have the C interface of include/septet.h, so this is ctypes on that header: structures, pointers, error numbers.
SEPTET_FORTRAN names the compiler whose library is used; without it the first of COMPILERS that is there.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import numpy as np

from septet.codes.tile import tile_bytes
from septet.errors import BackendUnavailableError, CodeRangeError, OptionError, ShapeError

__all__ = [
    "COMPILERS",
    "Activations",
    "Layer",
    "Rows",
    "SplitScales",
    "Tiles",
    "call",
    "checked",
    "compilers",
    "open_library",
    "rows_of",
    "tiles_of",
]

VARIABLE = "SEPTET_FORTRAN"
#: In order of preference.
COMPILERS = ("flang", "gfortran")
FOLDER = Path(__file__).parent.parent


class Tiles(ctypes.Structure):
    """septet_tiles."""

    _fields_ = [("packed", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("bits", ctypes.c_int)]


class Activations(ctypes.Structure):
    """septet_activations."""

    _fields_ = [("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("tokens", ctypes.c_int64), ("segment", ctypes.c_int64)]


class SplitScales(ctypes.Structure):
    """septet_split_scales."""

    _fields_ = [("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("group_size", ctypes.c_int64)]


class Rows(ctypes.Structure):
    """septet_rows."""

    _fields_ = [("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("rows", ctypes.c_int64), ("features", ctypes.c_int64)]


class Layer(ctypes.Structure):
    """septet_layer."""

    _fields_ = [
        ("code", ctypes.c_int),
        ("bits", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("in_features", "out_features")),
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "offset", "input_scale")),
        *((name, ctypes.c_int64) for name in ("input_block", "output_block", "group_size", "segment")),
        ("arranged_for", ctypes.c_void_p),
    ]


def _path(compiler: str) -> Path:
    return FOLDER / f"libseptet_fortran_{compiler}.so"


def compilers() -> dict[str, str]:
    """{compiler: "" or why its library is not there}, in order of preference."""
    return {name: "" if _path(name).exists() else f"septet was built without {name}" for name in COMPILERS}


def open_library(compiler: str | None = None) -> tuple[str, ctypes.CDLL]:
    """Open the library of one compiler.

    Args:
        compiler: one of COMPILERS; None takes SEPTET_FORTRAN, or without it the first whose library is there.

    Returns:
        The compiler's name and the library.

    Raises:
        BackendUnavailableError: the named library does not exist or cannot be loaded.
        ImportError: no name was given, and there is no library at all.
    """
    found = compilers()
    name = compiler or os.environ.get(VARIABLE) or next((name for name, obstacle in found.items() if not obstacle), None)
    if name is None:
        raise ImportError(f"septet was built without a Fortran compiler; install {' or '.join(reversed(COMPILERS))} and build again")
    hint = f"choose one of {', '.join(COMPILERS)} whose library was built, or leave {VARIABLE} unset"
    if found.get(name, "unknown name"):
        raise BackendUnavailableError(f"{VARIABLE} must name a Fortran compiler", f"{name} ({found.get(name, 'unknown name')})", hint)
    try:
        library = ctypes.CDLL(str(_path(name)))
    except OSError as error:
        raise BackendUnavailableError("the Fortran library must load", str(error), "install that compiler's runtime library") from error
    library.septet_error_message.restype = ctypes.c_char_p
    return name, library


def call(library: ctypes.CDLL, name: str, *arguments: object) -> None:
    """Call `septet_<name>`: arrays become pointers, structures references, integers what septet.h declares.

    Args:
        library: from `open_library`.
        name: without the prefix.
        arguments: arrays, None, structures, 64-bit integers, or instances of ctypes.c_int.

    Raises:
        OptionError, CodeRangeError, ShapeError, MemoryError: what the error number means.
    """
    error = getattr(library, f"septet_{name}")(*map(_argument, arguments))
    if error == 0:
        return
    message = library.septet_error_message(error).decode()
    if error == 3:
        raise OptionError("bits per pair must be 6, 7 or 8", message, "choose 3.0, 3.5 or 4.0 bits per weight")
    if error == 7:
        raise CodeRangeError("every symbol or encoder input must be in range", message, "check the bits per pair")
    if error == 8:
        raise OptionError("a number of threads must be positive", message, "check threads")
    if error == 11:
        raise MemoryError(message)
    raise ShapeError("sizes must fit each other", f"{message} ({name})", "check the sizes")


def _argument(value: object) -> object:
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else value


def checked(array: np.ndarray, name: str, dtype: type, shape: tuple[int | None, ...]) -> np.ndarray:
    """`array`, if it is contiguous, of this dtype and shape (None: any size).

    Raises:
        ShapeError: it is not.
    """
    fits = array.ndim == len(shape) and all(wanted in (None, size) for wanted, size in zip(shape, array.shape))
    if fits and array.dtype == dtype and array.flags.c_contiguous:
        return array
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    got = f"{array.dtype} {list(array.shape)}" + ("" if array.flags.c_contiguous else ", not contiguous")
    raise ShapeError(f"{name} must be contiguous {np.dtype(dtype)} [{wanted}]", got, "check the sizes")


def tiles_of(packed: np.ndarray, bits: int) -> Tiles:
    """Packed weights, uint8 [R, T*16*bits], as the library sees them; ShapeError and OptionError when they are not that."""
    size = tile_bytes(bits)
    checked(packed, "packed weights", np.uint8, (None, None))
    if 0 in packed.shape or packed.shape[1] % size:
        got = f"uint8 {list(packed.shape)}"
        raise ShapeError(f"packed weights must be uint8 [rows, columns * {size}]", got, "check the bits per pair of this tensor")
    return Tiles(packed.ctypes.data, packed.shape[0], packed.shape[1] // size, bits)


def rows_of(weight: np.ndarray, scale: np.ndarray) -> Rows:
    """A matrix int8 [N, K] and its scales float32 [N] as the library sees them; ShapeError when they are not that."""
    checked(weight, "weights", np.int8, (None, None))
    checked(scale, "scales", np.float32, (len(weight),))
    return Rows(weight.ctypes.data, scale.ctypes.data, *weight.shape)
