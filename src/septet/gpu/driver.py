"""CUDA C++ compiled where it runs: NVRTC and the driver, called through ctypes.

torch brings both libraries, so nothing but them is needed: no compiler, no headers. A kernel is launched as a programmatic
dependent: it may begin while the one before it ends, and waits by itself (griddepcontrol.wait) before it reads what that one wrote.
CUDA graphs capture such launches like any other.
"""

from __future__ import annotations

import ctypes
import glob
import importlib.util
import os
from functools import cache

from septet.errors import BackendUnavailableError

__all__ = ["Kernel", "TensorMap", "compile_source", "load_kernel", "obstacle", "shared_memory", "tensor_map"]

_NVRTC_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_SHARED_MEMORY_PERCENT = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
_SHARED_MEMORY_OF_A_BLOCK = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_MAJOR_CAPABILITY = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_COOPERATIVE = 2  # CU_LAUNCH_ATTRIBUTE_COOPERATIVE
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_WITHOUT_A_SHARED_MEMORY_CALL = 48 << 10
# blocks up to this size share a Hopper's multiprocessor, if the cache leaves them all of its memory
_ROOM_FOR_ANOTHER = 113 << 10
# of cuTensorMapEncodeTiled: bytes; no interleaving; 128 bytes a row, swizzled; lines of 256 bytes in the L2; zeros outside
_MAP_OF_BYTES, _MAP_PLAIN, _MAP_SWIZZLED, _MAP_L2, _MAP_ZEROS = 0, 0, 3, 3, 0
_MAP_ALIGNMENT = 64


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: a kind, padding, and a union of 64 bytes of which the first number is used here."""

    _fields_ = [("kind", ctypes.c_uint), ("padding", ctypes.c_uint), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60)]


class TensorMap(ctypes.Structure):
    """CUtensorMap."""

    _fields_ = [("words", ctypes.c_uint64 * 16)]


class _Configuration(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    ]


def _fail(what: str, got: object) -> BackendUnavailableError:
    return BackendUnavailableError(what, got, "use the Triton kernels: SEPTET_GPU=triton")


@cache
def _nvrtc() -> ctypes.CDLL:
    """NVRTC, from the loader's path or from the wheel that torch depends on."""
    candidates = list(_NVRTC_NAMES)
    wheels = importlib.util.find_spec("nvidia")
    for root in (wheels.submodule_search_locations or []) if wheels else []:
        candidates += sorted(glob.glob(os.path.join(root, "**", "libnvrtc.so.*"), recursive=True), reverse=True)
    for name in candidates:
        folder = os.path.dirname(name)
        try:
            # NVRTC opens its builtins by their name alone, and that of CUDA 13.0 does not look beside itself
            for builtins in glob.glob(os.path.join(folder, "libnvrtc-builtins.so.*")) if folder else ():
                ctypes.CDLL(builtins)
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise _fail("NVRTC must be installed", "none of " + ", ".join(_NVRTC_NAMES))


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise _fail("the CUDA driver must be installed", error) from error


@cache
def obstacle() -> str:
    """Why kernels cannot be compiled here, or nothing."""
    try:
        _nvrtc()
    except BackendUnavailableError as error:
        return str(error)
    return ""


def _check_driver(status: int, call: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise _fail(f"{call} must succeed", (text.value or b"unknown error").decode())


def compile_source(source: str, options: tuple[str, ...]) -> bytes:
    """Machine code of a CUDA C++ source; needs no GPU.

    Args:
        source: without includes.
        options: of NVRTC, an --gpu-architecture among them.

    Raises:
        BackendUnavailableError: NVRTC is missing or finds a mistake.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p

    def check(status: int) -> None:
        if status:
            raise _fail("NVRTC must compile septet's kernels", nvrtc.nvrtcGetErrorString(status).decode() + log())

    def log() -> str:
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, text)
        return "\n" + text.value.decode()

    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"septet.cu", 0, None, None))
    try:
        check(nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*(o.encode() for o in options))))
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        image = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, image))
        return image.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class Kernel:
    """One function of a loaded module.

    Args:
        function: CUfunction.
        types: the ctypes type of each parameter, in order.
        threads: of a block.
        shared: bytes of dynamic shared memory.
        attribute: of a launch: that it may begin while the one before it ends, or that all its blocks run at the same time; 0 is none.
    """

    def __init__(self, function: ctypes.c_void_p, types: tuple[type, ...], threads: int, shared: int, attribute: int) -> None:
        self._function, self._types, self._threads, self._shared = function, types, threads, shared
        self._attributes = int(attribute != 0)
        self._attribute = _Attribute(kind=attribute, value=1)

    def launch(self, grid: tuple[int, int], stream: int, *arguments: int | float | ctypes.Structure | None) -> None:
        """Put a launch into a stream.

        Args:
            grid: blocks along x and y.
            stream: cudaStream_t.
            arguments: one for each parameter; addresses as integers.
        """
        values = [value if isinstance(value, ctypes.Structure) else kind(value) for kind, value in zip(self._types, arguments, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        attribute = ctypes.pointer(self._attribute)
        configuration = _Configuration((*grid, 1), (self._threads, 1, 1), self._shared, stream, attribute, self._attributes)
        _check_driver(_driver().cuLaunchKernelEx(ctypes.byref(configuration), self._function, pointers, None), "cuLaunchKernelEx")


def _attribute_of(device: int, attribute: int) -> int:
    value = ctypes.c_int()
    _check_driver(_driver().cuDeviceGetAttribute(ctypes.byref(value), attribute, device), "cuDeviceGetAttribute")
    return value.value


def shared_memory(device: int) -> int:
    """Bytes of shared memory that a block can get on a device."""
    return _attribute_of(device, _SHARED_MEMORY_OF_A_BLOCK)


def tensor_map(address: int, rows: int, row_bytes: int, box_rows: int) -> TensorMap:
    """A matrix that Hopper's copy engine reads in boxes of 128 bytes a row, zeros outside.

    Args:
        address: of the matrix, a multiple of 16.
        rows, row_bytes: its size; row_bytes a multiple of 16.
        box_rows: of a box, at most 256.
    """
    memory = ctypes.create_string_buffer(ctypes.sizeof(TensorMap) + _MAP_ALIGNMENT)
    aligned = -(-ctypes.addressof(memory) // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
    sizes, strides = (ctypes.c_uint64 * 2)(row_bytes, rows), (ctypes.c_uint64 * 1)(row_bytes)
    box, steps = (ctypes.c_uint32 * 2)(128, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    what = ctypes.c_void_p(aligned), _MAP_OF_BYTES, 2, ctypes.c_void_p(address), sizes, strides, box, steps
    status = _driver().cuTensorMapEncodeTiled(*what, _MAP_PLAIN, _MAP_SWIZZLED, _MAP_L2, _MAP_ZEROS)
    _check_driver(status, "cuTensorMapEncodeTiled")
    return TensorMap.from_buffer_copy(ctypes.string_at(aligned, ctypes.sizeof(TensorMap)))


def load_kernel(image: bytes, name: str, types: tuple[type, ...], threads: int, shared: int = 0, order: str = "overlapping") -> Kernel:
    """A kernel of a compiled image, in the current context.

    Args:
        image: from `compile_source`.
        name: of an extern "C" function.
        types, threads, shared: as for `Kernel`.
        order: "overlapping": a launch may begin while the one before it ends, where the device can do that; "cooperative": all its blocks
            run at the same time; "plain".

    Raises:
        BackendUnavailableError: the driver refuses.
    """
    driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
    _check_driver(driver.cuModuleLoadData(ctypes.byref(module), image), "cuModuleLoadData")
    _check_driver(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
    if shared > _WITHOUT_A_SHARED_MEMORY_CALL:
        _check_driver(driver.cuFuncSetAttribute(function, _DYNAMIC_SHARED_MEMORY, shared), "cuFuncSetAttribute")
        if shared <= _ROOM_FOR_ANOTHER:
            _check_driver(driver.cuFuncSetAttribute(function, _SHARED_MEMORY_PERCENT, 100), "cuFuncSetAttribute")
    device = ctypes.c_int()
    _check_driver(driver.cuCtxGetDevice(ctypes.byref(device)), "cuCtxGetDevice")
    attribute = {"overlapping": _PROGRAMMATIC, "cooperative": _COOPERATIVE, "plain": 0}[order]
    if order == "overlapping" and _attribute_of(device.value, _MAJOR_CAPABILITY) < 9:
        attribute = 0
    return Kernel(function, types, threads, shared, attribute)
