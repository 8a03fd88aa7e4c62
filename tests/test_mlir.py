"""The way from Fortran through MLIR: every level is there, and every library at its end equals the reference bit for bit."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from needs import reason

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tool():
    """tools/lower_through_mlir.py as a module."""
    spec = importlib.util.spec_from_file_location("lower_through_mlir", ROOT / "tools" / "lower_through_mlir.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lowered(tool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the artefacts of every level."""
    if tool.missing_tools():
        pytest.skip(reason("mlir", "the loops that it lowers are tested as Fortran without"))
    folder = tmp_path_factory.mktemp("mlir")
    tool.lower(folder)
    return folder


def test_every_library_equals_the_reference(tool, lowered: Path) -> None:
    libraries = {path.name for path in lowered.glob("*.so")}
    assert libraries == {"fortran.so", "fir.so", "flang.so", "memrefs.so"}
    assert tool.check(lowered) == 5 * len(libraries)


def test_a_wrong_library_is_found(tool, lowered: Path, tmp_path: Path) -> None:
    """The float steps in another order give other bits; the check must see it."""
    text = (lowered / "fortran.ll").read_text()
    assert text.count("fmul ") > 3
    (tmp_path / "wrong.ll").write_text(text.replace("fadd ", "fsub ", 1))
    step = next(step for step in tool.STEPS if step.level == "library from FIR")
    places = {"{in}": str(tmp_path / "wrong.ll"), "{out}": str(tmp_path / "wrong.so")}
    tool.subprocess.run([places.get(word, word) for word in step.command], check=True, capture_output=True)
    with pytest.raises(SystemExit, match="wrong.so must equal the reference"):
        tool.check(tmp_path)


def test_levels_hold_what_their_names_say(tool, lowered: Path) -> None:
    rows = {row["level"]: row["operations"] for row in tool.figures(lowered)["levels"]}
    assert rows["HLFIR"]["hlfir"] and "hlfir" not in rows["FIR"] and "scf" not in rows["FIR"]
    assert rows["scf.parallel"]["scf"] and "scf.parallel" in (lowered / "scf.mlir").read_text()
    assert set(rows["LLVM dialect"]) == {"llvm"} == set(rows["memrefs: LLVM dialect"])
    assert rows["memrefs: GPU kernels"]["gpu"] and rows["memrefs: PTX"]["instructions"] > 100
    assert (lowered / "kernels.ptx").read_text().count(".visible .entry split_product_kernel") == 3


def test_the_document_shows_the_figures(tool) -> None:
    found = json.loads(tool.FIGURES.read_text())
    assert tool.START + tool.table(found) + tool.END in tool.DOCUMENT.read_text()
