"""What some tests need and not every machine has, by the names with which SEPTET_EXPECT_BACKENDS demands it (tools/expected_backends.py).

`make test`, which is what CI runs, demands each of them where the machine has it. So a test is skipped only where it cannot run.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

__all__ = ["COMPILERS", "GPUS", "needs", "needs_set", "program", "reason", "skip_module_without", "working_compilers", "working_gpus"]

#: Name -> in words.
GPUS = {"cuda": "a GPU", "two-gpus": "two GPUs", "hopper": "a Hopper GPU"}
#: Of GPU kernels; make test installs them if it can, and says so if not.
COMPILERS = {"triton": "Triton", "nvrtc": "NVRTC (nvidia-cuda-nvrtc)"}


@cache
def working_gpus() -> tuple[str, ...]:
    """Those of GPUS that torch can use here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = tuple(GPUS)[: min(count, 2)]
    return (*found, "hopper") if found and torch.cuda.get_device_capability() == (9, 0) else found


@cache
def working_compilers() -> tuple[str, ...]:
    """Those of COMPILERS that can be used here."""
    from septet.gpu import driver

    working = []
    with suppress(ImportError):  # imported, not looked for: a broken installation has a folder, too
        importlib.import_module("triton")
        working.append("triton")
    return (*working, *(() if driver.obstacle() else ("nvrtc",)))


def reason(name: str, instead: str) -> str:
    """Why a test is skipped without one of them.

    Args:
        name: of GPUS or COMPILERS.
        instead: what is tested without it.
    """
    return f"needs {(GPUS | COMPILERS)[name]}: SEPTET_EXPECT_BACKENDS demands {name} where a machine has it; {instead}"


def _is_missing(name: str) -> bool:
    return name not in (working_gpus() if name in GPUS else working_compilers())


def needs(name: str, instead: str) -> pytest.MarkDecorator:
    """A mark for tests that need one of them; arguments as for `reason`."""
    return pytest.mark.skipif(_is_missing(name), reason=reason(name, instead))


def needs_set(name: str, instead: str) -> pytest.MarkDecorator:
    """A mark for tests whose machine code needs an instruction set of the processor; arguments as for `reason`."""
    from native_cases import SETS

    why = f"needs a processor with {name}: SEPTET_EXPECT_BACKENDS demands {name} where a machine has it; {instead}"
    return pytest.mark.skipif(name not in SETS, reason=why)


def skip_module_without(name: str, instead: str) -> None:
    """Skip the module that calls this, unless there is one of them; arguments as for `reason`."""
    if _is_missing(name):
        pytest.skip(reason(name, instead), allow_module_level=True)


def program(*names: str) -> str | None:
    """The first of these programs that is on the path or beside the interpreter."""
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return next(filter(None, (shutil.which(name, path=places) for name in names)), None)
