"""The asserting programs in native/fortran/tests, from every Fortran compiler that is here, with bounds checked at run time."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from fortran_build import COMMANDS, SOURCES, compile_objects, link

if not COMMANDS:
    pytest.skip("needs gfortran or flang; make test installs them where it may", allow_module_level=True)

PROGRAMS = sorted(path.name for path in (SOURCES / "tests").glob("test_*.f90"))


@pytest.fixture(scope="module", params=COMMANDS)
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A compiler, and a folder with the objects it made."""
    folder = tmp_path_factory.mktemp(request.param)
    compile_objects(request.param, folder)
    return request.param, folder


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(objects: tuple[str, Path], program: str, tmp_path: Path) -> None:
    compiler, folder = objects
    done = subprocess.run([link(compiler, folder, f"tests/{program}"), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_programs_for_every_part() -> None:
    parts = {"layer", "model", "product", "quantization", "sampling", "weights"}
    assert parts <= {name.removeprefix("test_").removesuffix(".f90") for name in PROGRAMS}
