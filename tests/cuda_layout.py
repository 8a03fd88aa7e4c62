"""What compiled kernels are like: structures that are what Python takes them for, and nothing in memory that belongs into registers."""

from __future__ import annotations

import ctypes
import re
import struct

__all__ = ["same_layout", "stack_bytes"]

#: In a CUDA image, before the number of a symbol and the bytes of its stack frame: EIATTR_FRAME_SIZE, a value of 8 bytes.
_FRAME_SIZE = b"\x04\x11\x08\x00"


def same_layout(name: str, structure: type[ctypes.Structure]) -> str:
    """Assertions that a structure of a kernel has the size, and its fields the places and sizes, of its twin.

    Args:
        name: of the structure in C++, where fields have the names they have in Python.
        structure: the twin; a field `padding` stands for bytes without a name.
    """
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(structure)}, "size of {name}");']
    for field, *_ in structure._fields_:
        place = getattr(structure, field)
        if field == "padding":
            continue
        # what offsetof stands for in the compiler that NVRTC is; that of CUDA 13.0 and before has no __builtin_offsetof
        lines.append(f'static_assert(__INTADDR__(&(({name}*)0)->{field}) == {place.offset}, "{name}.{field}");')
        lines.append(f'static_assert(sizeof((({name}*)0)->{field}) == {place.size}, "size of {name}.{field}");')
    return "\n".join(lines)


def stack_bytes(image: bytes) -> int:
    """The largest stack frame of a compiled image's functions: what registers had no room for, if nothing else needs one."""
    frames = [struct.unpack("<II", found)[1] for found in re.findall(re.escape(_FRAME_SIZE) + b"(.{8})", image, re.DOTALL)]
    assert frames, "an image says how large the frames of its functions are"
    return max(frames)
