"""Kernels: decoding and products, in several backends with one interface.

`kernels.reference` says what every function does. `select_backend` takes the first of `_BACKENDS` that works here, or
exactly the one that SEPTET_BACKEND names: an unknown or unavailable name is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib
import os
from functools import cache
from types import ModuleType

from septet.errors import BackendUnavailableError
from septet.kernels.weights import LayerWeights

__all__ = ["BACKEND_VARIABLE", "LayerWeights", "available_backends", "select_backend"]

BACKEND_VARIABLE = "SEPTET_BACKEND"

#: Name and module, fastest first; what stands behind the reference is never chosen unasked.
_BACKENDS = (
    ("native", "septet.kernels.native"),
    ("reference", "septet.kernels.reference"),
    ("fortran", "septet.kernels.fortran"),
)


@cache
def _load(module: str) -> ModuleType | str:
    """The module, or why it cannot be imported. A BackendUnavailableError (an impossible SEPTET_CPU) is the caller's to see."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return str(error)


def available_backends() -> dict[str, str | None]:
    """All backends in order of preference.

    Returns:
        name -> None when usable, otherwise the reason why not.
    """
    reasons: dict[str, str | None] = {}
    for name, module in _BACKENDS:
        try:
            loaded = _load(module)
        except BackendUnavailableError as error:
            reasons[name] = str(error)
        else:
            reasons[name] = loaded if isinstance(loaded, str) else None
    return reasons


def select_backend(name: str | None = None) -> ModuleType:
    """The backend to use.

    Args:
        name: a backend's name; None takes the environment variable SEPTET_BACKEND, or without it the first that works.

    Returns:
        The backend's module.

    Raises:
        BackendUnavailableError: the name is unknown, or the backend does not work here.
    """
    name = name or os.environ.get(BACKEND_VARIABLE)
    if name:
        module = dict(_BACKENDS).get(name)
        loaded = "unknown name" if module is None else _load(module)
        if isinstance(loaded, ModuleType):
            return loaded
        raise BackendUnavailableError(f"{BACKEND_VARIABLE} must name a backend that works here", f"{name} ({loaded})", _choices())
    for _, module in _BACKENDS:
        loaded = _load(module)
        if isinstance(loaded, ModuleType):
            return loaded
    raise BackendUnavailableError("a kernel backend must work here", "none", _choices())


def _choices() -> str:
    """One line that lists every backend and why it cannot be used."""
    states = (f"{name} ({'available' if reason is None else reason})" for name, reason in available_backends().items())
    return "choose one of: " + ", ".join(states)
