"""The architecture as a check: who may import whom, how large a file or function may be, and that the drawn trees are true.

The budgets come from CONTRIBUTING.md. Raising one is a decision: change it here, in a commit that says why.
"""

from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON_FILES = sorted(path for folder in ("src", "tests", "tools", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
PACKAGE_FILES = [path for path in PYTHON_FILES if path.is_relative_to(ROOT / "src")]
NATIVE_SUFFIXES = {".cpp", ".h", ".f90", ".cu"}
NATIVE_FILES = sorted(
    path for folder in ("native", "include", "src") for path in (ROOT / folder).rglob("*") if path.suffix in NATIVE_SUFFIXES
)

PYTHON_FILE_LINES = 300
NATIVE_FILE_LINES = 400
FUNCTION_LINES = 60
MEDIAN_FUNCTION_LINES = 15
PARAMETERS = 7
MODULE_DOCSTRING_LINES = 15


def name_of(path: Path) -> str:
    """The path from the repository's root, as a test id."""
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a file, nested ones too."""
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The parameters a caller thinks about: without self, cls and the options of a command line (annotated defaults)."""
    given = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return [argument.arg for argument in given if argument.arg not in {"self", "cls"}]


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the parameters are options of a command, which a reader sees one at a time."""
    return any(ast.unparse(decorator).endswith(".command()") for decorator in function.decorator_list)


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is a Triton kernel or part of one, which knows no objects."""
    return "triton.jit" in map(ast.unparse, function.decorator_list)


def test_import_contracts_hold() -> None:
    command = shutil.which("lint-imports", path=Path(sys.executable).parent)
    assert command, "import-linter must be installed beside this Python"
    result = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_importing_septet_is_light() -> None:
    code = "import sys, septet; print(sorted({'numpy', 'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_python_file_keeps_its_budget(path: Path) -> None:
    text = path.read_text()
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring, "a module starts with its idea"
    assert len(docstring.splitlines()) <= MODULE_DOCSTRING_LINES
    assert len(text.splitlines()) <= PYTHON_FILE_LINES
    too_long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path) if f.end_lineno - f.lineno + 1 > FUNCTION_LINES}
    assert not too_long
    thought_about = [f for f in functions(path) if not is_command(f) and not is_kernel(f)]
    assert not {f.name: parameters(f) for f in thought_about if len(parameters(f)) > PARAMETERS}


@pytest.mark.parametrize("path", NATIVE_FILES, ids=name_of)
def test_native_file_keeps_its_budget(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= NATIVE_FILE_LINES


def test_functions_are_short_on_the_whole() -> None:
    lengths = [f.end_lineno - f.lineno + 1 for path in PACKAGE_FILES for f in functions(path)]
    assert statistics.median(lengths) <= MEDIAN_FUNCTION_LINES


@pytest.mark.parametrize("path", PYTHON_FILES, ids=name_of)
def test_no_broad_except_no_star_import_no_leftovers(path: Path) -> None:
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert [alias.name for alias in node.names] != ["*"], f"line {node.lineno}: import *"
        if isinstance(node, ast.ExceptHandler):
            caught = "everything" if node.type is None else ast.unparse(node.type)
            assert caught not in {"everything", "Exception", "BaseException"}, f"line {node.lineno}: except {caught}"
    assert not re.search(r"#\s*(TODO|FIXME|XXX)", text)


@pytest.mark.parametrize("path", [path for path in PYTHON_FILES if path.parent == ROOT / "tests"], ids=name_of)
def test_skips_give_the_reason_that_names_what_is_demanded(path: Path) -> None:
    """One from tests/needs.py; nothing is skipped because a package is missing, and no failure is expected."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    reasoned = set()
    for call in (node for node in nodes if isinstance(node, ast.Call)):
        given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "reason")]
        if any(ast.unparse(one).startswith("reason(") for one in given):
            reasoned.add(ast.unparse(call.func) + str(call.func.lineno))
    for node in (node for node in nodes if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.")):
        where = f"line {node.lineno}: {ast.unparse(node)}"
        assert node.attr not in {"importorskip", "xfail"}, where
        if node.attr in {"skip", "skipif"}:
            assert ast.unparse(node) + str(node.lineno) in reasoned, f"{where} without needs.reason"


def test_tree_in_architecture_is_the_disk() -> None:
    result = subprocess.run([sys.executable, ROOT / "tools" / "draw_tree.py", "--check"], check=False)
    assert result.returncode == 0, "run: python tools/draw_tree.py"


@pytest.mark.parametrize("path", NATIVE_FILES, ids=name_of)
def test_native_file_starts_with_its_idea(path: Path) -> None:
    says_it = re.match(r"//|/\*|!", path.read_text())
    assert says_it or path.with_suffix(".h").exists(), "start with a comment, here or in the header"
