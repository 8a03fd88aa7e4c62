"""What some tests need and not every machine has, by the names with which SEPTET_EXPECT_BACKENDS demands it (tools/expected_backends.py).

`make test`, which is what CI runs, demands each of them where the machine has it. So a test is skipped only where it cannot run, and its
reason comes from here. What make test installs everywhere, torch and the like, tests import: without it a run fails.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import pytest

from variants import variants

sys.path.append(str(Path(__file__).parent.parent / "tools"))

from expected_backends import PROGRAMS

__all__ = [
    "COMPILERS",
    "GPUS",
    "TOOLCHAINS",
    "needs",
    "program",
    "reason",
    "skip_module_without",
    "working_compilers",
    "working_gpus",
    "working_toolchains",
]

#: Name -> in words.
GPUS = {"cuda": "a GPU", "two-gpus": "two GPUs", "hopper": "a Hopper GPU"}
#: Of GPU kernels; make test installs them if it can, and says so if not.
COMPILERS = {"triton": "Triton", "nvrtc": "NVRTC (nvidia-cuda-nvrtc)"}
#: Of programs that some tests run; make test installs their packages where it may.
TOOLCHAINS = {"emulated-neon": "g++-aarch64-linux-gnu and qemu-user-static", "mlir": "flang-22, mlir-22-tools and clang-22"}
#: Of septet's own backends and of what they are compared with; other names are instruction sets.
_OTHERS = {"fortran": "a Fortran compiler", "llama-cpp": "the extra septet[bench]"}


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


@cache
def working_toolchains() -> tuple[str, ...]:
    """Those of TOOLCHAINS whose programs run here: one that is installed and does not is not among them."""

    def runs(names: tuple[str, ...]) -> bool:
        found = program(*names)
        return found is not None and subprocess.run([found, "--version"], capture_output=True).returncode == 0

    return tuple(name for name in TOOLCHAINS if all(map(runs, PROGRAMS[name])))


def reason(name: str, instead: str) -> str:
    """Why a test is skipped without one of them.

    Args:
        name: one that SEPTET_EXPECT_BACKENDS can demand.
        instead: what is tested without it.
    """
    what = (GPUS | COMPILERS | TOOLCHAINS | _OTHERS).get(name, f"a processor with {name}")
    return f"needs {what}: SEPTET_EXPECT_BACKENDS demands {name} where a machine has it; {instead}"


def _is_missing(name: str) -> bool:
    for names, working in ((GPUS, working_gpus), (COMPILERS, working_compilers), (TOOLCHAINS, working_toolchains)):
        if name in names:
            return name not in working()
    return not variants("fortran") if name == "fortran" else name not in variants("native")


def needs(name: str, instead: str) -> pytest.MarkDecorator:
    """A mark for tests that need one of them; arguments as for `reason`."""
    return pytest.mark.skipif(_is_missing(name), reason=reason(name, instead))


def skip_module_without(name: str, instead: str) -> None:
    """Skip the module that calls this, unless there is one of them; arguments as for `reason`."""
    if _is_missing(name):
        pytest.skip(reason(name, instead), allow_module_level=True)


def program(*names: str) -> str | None:
    """The first of these programs that is on the path or beside the interpreter."""
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    return next(filter(None, (shutil.which(name, path=places) for name in names)), None)
