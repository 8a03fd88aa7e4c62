"""Fortran sources compiled for tests: without much optimization, and with every check the compiler has."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent.parent / "native" / "fortran"
COMMON = ["-O1", "-ffp-contract=off", "-std=f2018"]

#: compiler -> the command with its options, up to the one before the folder for modules.
COMMANDS = {
    name: [program, *COMMON, *options]
    for name, programs, options in (
        ("gfortran", ["gfortran"], ["-Wall", "-Wextra", "-Werror", "-fcheck=all,no-array-temps", "-J"]),
        ("flang", ["flang-22", "flang", "flang-new"], ["-pedantic", "-Wno-unused-variable", "-Werror", "-module-dir"]),
    )
    for program in list(filter(shutil.which, programs))[:1]
}


def compile_objects(compiler: str, folder: Path) -> None:
    """Compile everything but the main program into object files and modules in `folder`; a warning is an error."""
    names = [name for name in (SOURCES / "sources.txt").read_text().split() if name != "model/main.f90"]
    run(compiler, folder, "-c", *(str(SOURCES / name) for name in [*names, "tests/asserting.f90"]))


def link(compiler: str, folder: Path, source: str) -> Path:
    """Compile a main program, a path below native/fortran, with the objects in `folder`."""
    program = folder / Path(source).stem
    run(compiler, folder, str(SOURCES / source), *(str(path) for path in sorted(folder.glob("*.o"))), "-o", str(program))
    return program


def run(compiler: str, folder: Path, *arguments: str) -> None:
    done = subprocess.run([*COMMANDS[compiler], str(folder), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
