"""The C interface and its Python module: memory is touched only where septet.h says, arguments and variables obeyed or refused."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from native_cases import SETS, SIZES, equal, instruction_set, native, padded, random_int8, random_packed  # noqa: F401
from septet.codes import trellis_search
from septet.errors import BackendUnavailableError, CodeRangeError, OptionError, ShapeError
from septet.kernels import fortran_library, reference

ROOT = Path(__file__).parent.parent
NO_ACCESS = 0
POISON = 0xA5


class Guarded:
    """Arrays that end (or begin) at a page nobody may touch: one byte too far is a crash."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.maps: list[mmap.mmap] = []

    def empty(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """An array full of poison."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        pages = -(-max(size, 1) // mmap.PAGESIZE)
        area = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        self.maps.append(area)
        whole = np.frombuffer(area, np.uint8)
        whole[:] = POISON
        for page in (0, pages + 1):
            address = ctypes.c_void_p(whole.ctypes.data + page * mmap.PAGESIZE)
            assert self.libc.mprotect(address, ctypes.c_size_t(mmap.PAGESIZE), NO_ACCESS) == 0
        start = (pages + 1) * mmap.PAGESIZE - size if self.at_end else mmap.PAGESIZE
        return whole[start : start + size].view(dtype).reshape(shape)

    def copy(self, array: np.ndarray) -> np.ndarray:
        result = self.empty(array.shape, array.dtype.type)
        result[:] = array
        return result


class Tiles(ctypes.Structure):
    _fields_ = [("packed", ctypes.c_void_p), ("rows", ctypes.c_int64), ("columns", ctypes.c_int64), ("bits", ctypes.c_int)]


class Activations(ctypes.Structure):
    _fields_ = [("values", ctypes.c_void_p), ("scales", ctypes.c_void_p), ("tokens", ctypes.c_int64), ("segment", ctypes.c_int64)]


class SplitScales(ctypes.Structure):
    _fields_ = [("scale", ctypes.c_void_p), ("offset", ctypes.c_void_p), ("group_size", ctypes.c_int64)]


class Rows(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("rows", ctypes.c_int64), ("features", ctypes.c_int64)]


def call(name: str, *arguments: object) -> int:
    """Call a C function: arrays become pointers, structures references, everything else 64-bit integers."""
    converted = []
    for argument in arguments:
        if isinstance(argument, np.ndarray):
            converted.append(ctypes.c_void_p(argument.ctypes.data))
        elif isinstance(argument, ctypes.Structure):
            converted.append(ctypes.byref(argument))
        else:
            converted.append(None if argument is None else ctypes.c_int64(argument))
    return getattr(native.library(), f"septet_{name}")(*converted)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 9])
@pytest.mark.usefixtures("instruction_set")
def test_products_touch_their_arrays_only(rng: np.random.Generator, tokens: int, at_end: bool) -> None:
    guarded = Guarded(at_end)
    for outputs, inputs in SIZES:
        features, rows = padded(inputs), -(-outputs // 64)
        xq = guarded.copy(random_int8(rng, tokens, features))
        xscale = guarded.copy(rng.random((tokens, 1), np.float32))
        x = Activations(xq.ctypes.data, xscale.ctypes.data, tokens, features)
        for bits in (6, 7, 8):
            packed = guarded.copy(random_packed(rng, outputs, inputs, bits))
            tiles = Tiles(packed.ctypes.data, rows, features // 4, bits)
            y = guarded.empty((tokens, rows * 64), np.float32)
            assert call("trellis_product", tiles, x, y, 1) == 0
            equal(y, reference.trellis_product(packed, bits, xq, xscale, features))
            levels = guarded.empty((rows * 64, features), np.int8)
            assert call("trellis_levels", tiles, levels, 1) == 0
            equal(levels, reference.trellis_levels(packed, bits))
        tiles = Tiles(guarded.copy(packed[:, : features // 4 * 112]).ctypes.data, rows, features // 4, 7)
        scale = guarded.copy(rng.random((2, rows * 64), np.float32))
        y = guarded.empty((tokens, outputs), np.float32)
        assert call("split_product", tiles, SplitScales(scale.ctypes.data, None, features), x, outputs, y, 1) == 0
        wanted = reference.split_product(packed[:, : features // 4 * 112], scale[:, :outputs].T, None, xq, xscale, features, outputs)
        equal(y, wanted)
        floats = guarded.copy(rng.standard_normal((tokens, features)).astype(np.float32))
        assert call("split_product_float", tiles, SplitScales(scale.ctypes.data, None, features), floats, tokens, outputs, y, 1) == 0
        assert call("trellis_product_float", tiles, floats, tokens, guarded.empty((tokens, rows * 64), np.float32), 1) == 0


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])
@pytest.mark.usefixtures("instruction_set")
def test_other_functions_touch_their_arrays_only(rng: np.random.Generator, at_end: bool) -> None:
    guarded = Guarded(at_end)
    for outputs, inputs, tokens in ((1, 1, 1), (3, 63, 2), (6, 65, 5), (5, 130, 9)):
        weight, scale = guarded.copy(random_int8(rng, outputs, inputs)), guarded.copy(rng.random(outputs, np.float32))
        xq, xscale = guarded.copy(random_int8(rng, tokens, inputs)), guarded.copy(rng.random((tokens, 1), np.float32))
        rows = Rows(weight.ctypes.data, scale.ctypes.data, outputs, inputs)
        y = guarded.empty((tokens, outputs), np.float32)
        assert call("int8_product", rows, Activations(xq.ctypes.data, xscale.ctypes.data, tokens, inputs), y, 1) == 0
        equal(y, reference.int8_product(weight, scale, xq, xscale))
        x = guarded.copy(rng.standard_normal((tokens, inputs)).astype(np.float32))
        assert call("int8_product_float", rows, x, tokens, y, 1) == 0
        block = inputs & -inputs
        turned = guarded.empty(x.shape, np.float32)
        assert call("hadamard", x, tokens, inputs, block, turned) == 0
        equal(turned, reference.hadamard(x, block))
        values, scales = guarded.empty(x.shape, np.int8), guarded.empty((tokens, -(-inputs // 7)), np.float32)
        assert call("quantize_activations", x, tokens, inputs, 7, values, scales) == 0
        equal(values, reference.quantize_activations(x, 7)[0])
        equal(scales, reference.quantize_activations(x, 7)[1])
    for bits in (6, 7, 8):
        symbols = guarded.copy(rng.integers(0, 1 << bits, (3, 128), np.uint8))
        packed, back = guarded.empty((3, 16 * bits), np.uint8), guarded.empty((3, 128), np.uint8)
        assert call("pack", symbols, 3, bits, packed) == 0 and call("unpack", packed, 3, bits, back) == 0
        equal(back, symbols)
        fixed = guarded.copy(rng.integers(-1020, 1021, (1, 256)).astype(np.int16))
        assert call("trellis_encode", fixed, 1, bits, back, 1) == 0
        equal(back[:1], reference.trellis_encode(fixed, bits))


@pytest.mark.usefixtures("instruction_set")
def test_c_functions_refuse_what_they_cannot_do(rng: np.random.Generator) -> None:
    packed, out = random_packed(rng, 64, 8, 7), np.zeros(64, np.float32)
    tiles = Tiles(packed.ctypes.data, 1, 2, 7)
    null, size, bits, block, group, threads = 1, 2, 3, 4, 5, 8
    x = np.zeros((1, 8), np.float32)
    assert call("unpack", packed, 1, 5, out) == bits
    assert call("unpack", packed, -1, 7, out) == size and call("unpack", packed, 1 << 60, 7, out) == size
    assert call("trellis_product_float", tiles, None, 1, out, 1) == null
    assert call("trellis_product_float", tiles, x, 1, out, -1) == threads
    assert call("trellis_product_float", Tiles(packed.ctypes.data, 1, 1 << 40, 7), x, 1, out, 1) == size
    assert call("hadamard", x, 1, 8, 3, out) == block and call("hadamard", x, 1, 8, 16, out) == block
    assert call("split_product_float", tiles, SplitScales(out.ctypes.data, None, 6), x, 1, 64, out, 1) == group
    assert call("split_product_float", tiles, SplitScales(out.ctypes.data, None, 8), x, 1, 65, out, 1) == size
    library = native.library()
    library.septet_error_message.restype = ctypes.c_char_p
    messages = [library.septet_error_message(number) for number in range(16)]
    assert len(set(messages)) == 16 and messages[15] == library.septet_error_message(-1)


@pytest.mark.usefixtures("instruction_set")
def test_wrong_arguments_raise_septet_errors(rng: np.random.Generator) -> None:
    packed, xq = random_packed(rng, 64, 8, 7), random_int8(rng, 2, 8)
    with pytest.raises(OptionError, match="6, 7 or 8"):
        native.unpack(packed, 5)
    with pytest.raises(ShapeError, match="columns \\* 128"):
        native.unpack(packed, 8)
    with pytest.raises(CodeRangeError):
        native.pack(np.full((1, 1, 128), 128, np.uint8), 7)
    with pytest.raises(CodeRangeError):
        native.trellis_encode(np.full((1, 256), 1021, np.int16), 7)
    for wrong in (xq.astype(np.int16), np.asfortranarray(xq), xq[:, :4], xq[0]):
        with pytest.raises(ShapeError, match=r"contiguous int8 \[any, 8\]"):
            native.trellis_accumulate(packed, 7, wrong)
    with pytest.raises(ShapeError, match="power of two"):
        native.hadamard(np.zeros((2, 6), np.float32), 4)
    with pytest.raises(ShapeError, match="at least 1"):
        native.quantize_activations(np.zeros((2, 6), np.float32), 0)
    with pytest.raises(OptionError, match="threads"):
        native.trellis_encode(np.zeros((1, 256), np.int16), 7, -1)
    empty = np.zeros((2, 0), np.int8)
    with pytest.raises(ShapeError):
        native.int8_product(empty, np.ones(2, np.float32), empty, np.zeros((2, 0), np.float32))
    for scale, offset in ((np.ones((64, 2)), None), (np.ones((64, 4)), np.ones((64, 2)))):
        with pytest.raises(ShapeError):
            native.split_product(packed, scale, offset, xq, np.ones((2, 2), np.float32), 4, 64)
        with pytest.raises(ShapeError):
            native.split_product_float(packed, scale, offset, xq.astype(np.float32), 4, 64)


def test_an_unknown_build_is_refused() -> None:
    with pytest.raises(BackendUnavailableError, match="avx1024"):
        native.set_instruction_set("avx1024")


def run_python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter with these environment variables."""
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True)


@pytest.mark.parametrize("name", SETS)
def test_variables_are_obeyed(name: str) -> None:
    show = "from septet.kernels import native; print(native.instruction_set(), native._native.default_threads())"
    assert run_python(show, SEPTET_CPU=name, SEPTET_THREADS="3", OMP_NUM_THREADS="2").stdout.split() == [name, "3"]
    assert run_python(show, SEPTET_CPU=name, SEPTET_THREADS="", OMP_NUM_THREADS="2,1").stdout.split() == [name, "2"]


@pytest.mark.parametrize("variable, value", [("SEPTET_CPU", "avx1024"), ("SEPTET_THREADS", "many"), ("SEPTET_THREADS", "0")])
def test_wrong_variables_are_refused_at_once(variable: str, value: str) -> None:
    done = run_python("import septet.kernels as k; k.select_backend()", **{variable: value})
    assert done.returncode == 1
    assert variable in done.stderr.splitlines()[-1] and value in done.stderr.splitlines()[-1]


def test_a_forked_child_has_its_own_pool(rng: np.random.Generator) -> None:
    code = """
import os
import numpy as np
from septet.kernels import native

packed, xq = np.zeros((64, 512 * 112), np.uint8), np.ones((1, 2048), np.int8)
product = lambda: native.trellis_accumulate(packed, 7, xq, 2).tobytes()
before = product()
child = os.fork()
if child == 0:
    os._exit(0 if product() == before else 1)
assert os.waitpid(child, 0)[1] == 0 and product() == before
"""
    assert run_python(code).returncode == 0


def test_generated_tables_are_up_to_date() -> None:
    assert subprocess.run([sys.executable, "tools/generate_tables.py", "--check"], cwd=ROOT).returncode == 0


HEADER = ROOT / "include" / "septet.h"
STRUCTURES = [getattr(fortran_library, name) for name in ("Tiles", "Activations", "SplitScales", "Rows", "Layer")]


def header_functions() -> set[str]:
    """Every function that include/septet.h declares."""
    return set(re.findall(r"^SEPTET_API [^(;]*?\b(septet_\w+)\(", HEADER.read_text(), flags=re.MULTILINE))


@pytest.mark.usefixtures("instruction_set")
def test_the_library_has_the_functions_of_the_header() -> None:
    """Fortran has no instruction sets and no threads to ask for, and its models are a program; all else is there under the same names."""
    expected = header_functions()
    assert len(expected) > 30
    if native.module.NAME == "fortran":
        expected = {name for name in expected if not re.search("instruction_set|default_threads|read_sum|engine", name)}
        assert {"septet_pack", "septet_split_product", "septet_trellis_search", "septet_linear"} <= expected
    library = native.library()
    assert [name for name in sorted(expected) if not hasattr(library, name)] == []


@pytest.mark.usefixtures("instruction_set")
def test_search_with_other_levels(rng: np.random.Generator) -> None:
    levels = rng.integers(-127, 128, (1 << 16, 2), np.int8)
    fixed = np.clip(rng.standard_normal((2, 256)) * 200, -1020, 1020).astype(np.int16)
    symbols = np.empty((2, 128), np.uint8)
    assert call("trellis_search", levels, fixed, 2, 7, symbols, 1) == 0
    equal(symbols, trellis_search.search(fixed, levels, 7))
    levels[77, 1] = -128
    assert call("trellis_search", levels, fixed, 2, 7, symbols, 1) == call("trellis_encode", fixed + 4000, 2, 7, symbols, 1) == 7
    assert call("trellis_search", None, fixed, 2, 7, symbols, 1) == 1 and call("trellis_search", levels, fixed, 2, 9, symbols, 1) == 3


@pytest.mark.parametrize("structure", STRUCTURES)
def test_structures_are_those_of_the_header(structure: type[ctypes.Structure]) -> None:
    """Names and kinds of all fields, in order; a field that only one side knows would be read from beyond the end."""
    name = structure.__doc__.rstrip(".")
    kinds = {"int": ctypes.c_int, "int64_t": ctypes.c_int64}
    body = re.search(rf"typedef struct {name} {{(.*?)}} {name};", HEADER.read_text(), re.DOTALL).group(1)
    fields = re.findall(r"^ +(?:const )?(\w+)(\*?) (\w+);", body, re.MULTILINE)
    assert [(field, ctypes.c_void_p if star else kinds[kind]) for kind, star, field in fields] == structure._fields_
