"""The builds of a backend that tests must cover one by one: instruction sets of `native`, compilers of `fortran`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from septet import kernels

#: backend -> names of the functions that list its variants, name the one in use, and choose another
_FUNCTIONS = {
    "native": ("instruction_sets", "instruction_set", "set_instruction_set"),
    "fortran": ("compilers", "compiler", "set_compiler"),
}


def working_backends() -> list[str]:
    """Every backend that works here."""
    return [name for name, reason in kernels.available_backends().items() if reason is None]


def variants(backend: str) -> list[str]:
    """The builds of a backend that work here; none for a backend that exists once."""
    if backend not in _FUNCTIONS or backend not in working_backends():
        return []
    listed = getattr(kernels.select_backend(backend), _FUNCTIONS[backend][0])()
    return [name for name, obstacle in listed.items() if not obstacle]


@contextmanager
def chosen(backend: str, variant: str = "") -> Iterator[ModuleType]:
    """The module of a backend, with one of its builds in use until the end."""
    module = kernels.select_backend(backend)
    if not variant:
        yield module
        return
    _, current, choose = (getattr(module, name) for name in _FUNCTIONS[backend])
    before = current()
    choose(variant)
    assert current() == variant
    try:
        yield module
    finally:
        choose(before)
