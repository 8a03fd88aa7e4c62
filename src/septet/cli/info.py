"""`septet info`: versions, the backend and instruction set in use, and why the others are not."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from septet import __version__
from septet.cli.app import app
from septet.cli.options import JsonOption
from septet.cli.output import console, print_json

__all__ = ["info"]

LIBRARIES = ("numpy", "torch", "transformers", "safetensors", "tokenizers", "gguf")
VARIABLES = ("SEPTET_BACKEND", "SEPTET_CPU", "SEPTET_FORTRAN", "SEPTET_THREADS", "OMP_NUM_THREADS")


@app.command()
def info(as_json: JsonOption = False) -> None:
    """Show versions and what the kernels run on."""
    found = collect()
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for name, version in found["versions"].items():
        table.add_row(name, version or "not installed")
    table.add_row("processors", str(found["processors"]))
    table.add_row("threads", str(found["threads"]))
    for kind in ("backend", "instruction_set"):
        table.add_row(kind.replace("_", " "), found[kind] or "none")
        for name, reason in found[f"{kind}s"].items():
            if name != found[kind]:
                table.add_row("", f"not {name}: {reason or 'works, but not chosen'}")
    for name, value in found["environment"].items():
        table.add_row(name, value)
    console().print(table)


def collect() -> dict:
    """What `septet info --json` prints.

    Returns:
        versions, processors, threads, backend (chosen), backends (name -> null or why it does not work), instruction_set
        and instruction_sets of the native backend likewise, environment (variables that are set).

    Raises:
        BackendUnavailableError: SEPTET_BACKEND or SEPTET_CPU names something that does not work here.
    """
    from septet import kernels
    from septet.quantize.threads import default_threads

    backend = kernels.select_backend()
    native = kernels.select_backend("native") if kernels.available_backends().get("native", "") is None else None
    sets = {} if native is None else {name: reason or None for name, reason in native.instruction_sets().items()}
    return {
        "versions": {"septet": __version__, "python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "processors": os.cpu_count(),
        "threads": default_threads(),
        "backend": backend.NAME,
        "backends": kernels.available_backends(),
        "instruction_set": native.instruction_set() if native is not None and backend.NAME == "native" else None,
        "instruction_sets": sets,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
