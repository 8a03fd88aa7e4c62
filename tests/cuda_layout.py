"""C++ that compiles only where a structure of a kernel is what Python takes it for."""

from __future__ import annotations

import ctypes

__all__ = ["same_layout"]


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
