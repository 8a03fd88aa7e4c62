"""Which backend is used: the first that works, or exactly the named one, never a silent fallback."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from needs import program
from septet import kernels
from septet.errors import BackendUnavailableError
from septet.kernels import fortran_library, reference


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of one backend that does not exist and the reference."""
    monkeypatch.delenv(kernels.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_BACKENDS", (("missing", "septet.kernels.missing"), ("reference", "septet.kernels.reference")))


def test_the_first_that_works_is_taken(backends: None) -> None:
    assert kernels.select_backend() is reference


def test_reasons_are_listed(backends: None) -> None:
    assert kernels.available_backends() == {"missing": "No module named 'septet.kernels.missing'", "reference": None}


@pytest.mark.parametrize("name", ["missing", "gpu9000"])
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_named_backend_has_no_fallback(backends: None, monkeypatch: pytest.MonkeyPatch, name: str, way: str) -> None:
    if way == "environment":
        monkeypatch.setenv(kernels.BACKEND_VARIABLE, name)
    with pytest.raises(BackendUnavailableError) as caught:
        kernels.select_backend(name if way == "argument" else None)
    assert name in str(caught.value)
    assert "missing (No module named" in str(caught.value) and "reference (available)" in str(caught.value)


def test_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.BACKEND_VARIABLE, "reference")
    assert kernels.select_backend() is reference
    assert reference.NAME == "reference"


def test_no_backend_at_all_is_an_error(backends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BACKENDS", (("missing", "septet.kernels.missing"),))
    with pytest.raises(BackendUnavailableError, match="a kernel backend must work here"):
        kernels.select_backend()


def test_an_impossible_instruction_set_is_not_a_reason_to_fall_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A backend that raises BackendUnavailableError while it loads (a wrong SEPTET_CPU) stops the choice."""
    raises = "raise BackendUnavailableError('SEPTET_CPU must name a set of this machine', 'neon', 'use scalar')"
    (tmp_path / "picky_backend.py").write_text(f"from septet.errors import BackendUnavailableError\n\n{raises}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv(kernels.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_BACKENDS", (("picky", "picky_backend"), ("reference", "septet.kernels.reference")))
    with pytest.raises(BackendUnavailableError, match="SEPTET_CPU"):
        kernels.select_backend()
    assert "SEPTET_CPU" in kernels.available_backends()["picky"]


def test_every_backend_has_the_whole_interface(backend: object) -> None:
    names = set(reference.__all__) - {"PreparedLayer"}
    assert names <= set(dir(backend))


def test_fortran_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.BACKEND_VARIABLE, raising=False)
    monkeypatch.setattr(kernels, "_BACKENDS", tuple(entry for entry in kernels._BACKENDS if entry[0] != "native"))
    assert kernels.select_backend() is reference


def test_without_any_fortran_library_the_reason_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fortran_library, "FOLDER", tmp_path)
    monkeypatch.delenv("SEPTET_FORTRAN", raising=False)
    with pytest.raises(ImportError, match="install gfortran or flang and build again"):
        fortran_library.open_library()
    for name in ("gfortran", "ifx"):
        monkeypatch.setenv("SEPTET_FORTRAN", name)
        with pytest.raises(BackendUnavailableError, match=name):
            fortran_library.open_library()


def test_the_build_goes_on_without_fortran_compilers(tmp_path: Path) -> None:
    """native/fortran in a project of its own, where no program can be found: it configures and builds, and names what is missing."""
    cmake, ninja = program("cmake"), program("ninja")
    assert cmake and ninja, "cmake and ninja must be on the path or beside the interpreter: make test installs them"
    source = Path(__file__).parent.parent / "native" / "fortran"
    project = f'cmake_minimum_required(VERSION 3.18)\nproject(septet LANGUAGES NONE)\nadd_subdirectory("{source}" fortran)\n'
    (tmp_path / "CMakeLists.txt").write_text(project)
    blind = [f"-DCMAKE_FIND_USE_{kind}_PATH=OFF" for kind in ("SYSTEM_ENVIRONMENT", "CMAKE_SYSTEM")]
    command = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *blind, "-S", tmp_path, "-B", tmp_path / "build"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for compiler in ("flang", "gfortran"):
        assert f"{compiler} is missing (Debian: apt-get install gfortran flang-22); built without it" in done.stdout
    built = subprocess.run([cmake, "--build", tmp_path / "build"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout
    assert not list(tmp_path.rglob("*.so"))
