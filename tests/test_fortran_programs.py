"""The asserting programs in native/fortran/tests, from every Fortran compiler that is here, with bounds checked at run time."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fortran_build import COMMANDS, SOURCES, compile_objects, link, run
from needs import reason

if not COMMANDS:
    pytest.skip(reason("fortran", "the kernels of septet in C++ are tested without"), allow_module_level=True)

PROGRAMS = sorted(path.name for path in (SOURCES / "tests").glob("test_*.f90"))

#: Program -> a source, a mistake in it (old, new), and the check that must see it.
MISTAKES = {
    "test_quantization.f90": ("activations.f90", "127 / largest", "128 / largest", "halves go to the even neighbour"),
    "test_product.f90": ("products.f90", "ibits(words(n, t), 11, 3)", "ibits(words(n, t), 11, 2)", "the product of every code of split"),
    "test_layer.f90": ("layers.f90", "y = y * l%scale(:, 1)", "y = y * l%scale(1, 1) * 2", "unit vectors give the weights"),
    "test_model.f90": ("model/llama.f90", "1 + exp(-gate)", "1 + exp(gate)", "swiglu far from 0 is its gate times up"),
    "test_weights.f90": ("model/tensor_file.f90", "ieor(", "ior(", "CRC-32 of the usual text"),
    "test_sampling.f90": ("model/sampling.f90", "16807 * g%state", "16806 * g%state", "the published value after 10000 steps"),
}


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


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_sees_a_mistake(objects: tuple[str, Path], program: str, tmp_path: Path) -> None:
    """A check that cannot fail checks nothing: with one mistake in one source the program ends with status 1 and says what is wrong."""
    compiler, folder = objects
    name, old, new, message = MISTAKES[program]
    text = (SOURCES / name).read_text()
    assert old in text
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / Path(name).name).write_text(text.replace(old, new))
    run(compiler, broken, "-c", str(broken / Path(name).name))
    (tmp_path / "empty").mkdir()
    done = subprocess.run([link(compiler, broken, f"tests/{program}"), str(tmp_path / "empty")], capture_output=True, text=True)
    assert done.returncode == 1 and f"failed: {message}" in done.stderr, done.stderr


def test_there_are_programs_for_every_part() -> None:
    parts = {"layer", "model", "product", "quantization", "sampling", "weights"}
    assert parts <= {name.removeprefix("test_").removesuffix(".f90") for name in PROGRAMS}
