"""Documents that cannot rot: README's blocks run, generated files regenerate to themselves, SPEC.md's tables are the code's.

README speaks of the demo's model; here the same lines run against a small model in the same places.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEC = (ROOT / "SPEC.md").read_text()
SAMPLE = ROOT / "src" / "septet" / "data" / "sample.txt"
NOT_HERE = ("make", "source")  # set-up, which CI does before the tests


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """The words of every line after a dollar sign, comments left out."""
    lines = [line[2:] for block in blocks(text, "console") for line in block.splitlines() if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))[0] not in NOT_HERE]


def run(words: list[str], folder: Path) -> str:
    """Run a command line of README with the septet of this environment; returns what it printed."""
    assert words[0] == "septet", f"README may show septet, {NOT_HERE}, got {words[0]}"
    program = [sys.executable, "-c", "import sys; from septet.cli import main; sys.argv[0] = 'septet'; sys.exit(main())"]
    result = subprocess.run([*program, *words[1:]], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A folder as `make demo` leaves the repository's: demo/original and demo/trellis, here of the small model."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_model_dir, folder / "demo" / "original")
    (folder / "notes.txt").write_bytes(SAMPLE.read_bytes()[:4096])
    run(["septet", "quantize", "demo/original", "demo/trellis"], folder)
    return folder


def test_readme_commands_run(demo_folder: Path) -> None:
    shown = commands(README)
    assert [words[1] for words in shown][:2] == ["quantize", "inspect"]
    for words in shown:
        run(words, demo_folder)


def test_readme_python_runs(demo_folder: Path) -> None:
    shown = blocks(README, "python")
    assert shown
    for code in shown:
        result = subprocess.run([sys.executable, "-c", code], cwd=demo_folder, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_example_one_matrix_runs() -> None:
    result = subprocess.run([sys.executable, ROOT / "examples" / "one_matrix.py"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["backend", "split", "trellis"]


def test_example_in_transformers_runs(tiny_model_dir: Path, tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "examples" / "quantize_in_transformers.py", tiny_model_dir, tmp_path / "out"]
    result = subprocess.run(words, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "same logits after reloading: True" in result.stdout


@pytest.mark.parametrize("tool", ["generate_tables.py"])
def test_generated_files_regenerate_to_themselves(tool: str) -> None:
    result = subprocess.run([sys.executable, ROOT / "tools" / tool, "--check"], capture_output=True, text=True)
    assert result.returncode == 0, f"run: python tools/{tool}"


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "SPEC.md", "docs/installation.md"])
def test_links_between_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)]+)\)", path.read_text()) if "://" not in target]
    assert not [target for target in targets if target and not (path.parent / target).exists()]


def test_sample_text_is_the_documented_one() -> None:
    import hashlib

    data, readme = SAMPLE.read_bytes(), (SAMPLE.parent / "README.md").read_text()
    assert f"`{hashlib.sha256(data).hexdigest()}`" in readme
    assert f"{len(data):,} bytes" in readme
    start = int(re.search(r"begins at byte ([\d,]+)", readme).group(1).replace(",", ""))
    assert data[start - 2 : start + 10] == b"\n\nSESSION IV"
