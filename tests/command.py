"""How tests run the command line: in this process or in one of its own, and what an error must look like."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from septet.cli import app

PROMPT = "Seven bits"
TEXT = "Two neighbouring weights share seven bits, and no bit is idle. " * 20


def septet(*arguments: object, input: str | bytes | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)


def septet_json(*arguments: object) -> dict:
    """Run a command that must print one JSON object and nothing else."""
    result = septet(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def septet_process(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "septet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def assert_error(result: Result | subprocess.CompletedProcess, *parts: str) -> None:
    """The result is exit code 1 and a message of three parts on stderr, without a traceback and without data."""
    code = result.exit_code if isinstance(result, Result) else result.returncode
    assert code == 1, result.stderr
    message, empty, hint = result.stderr.strip().rsplit("\n", 2)
    assert message.splitlines()[-1].startswith("error: ") and ", got " in message
    assert empty == "" and hint.startswith("hint: ")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def flip_last_byte(directory: Path) -> None:
    """Change one bit of a packed weight: the narrowest dtype lies last."""
    shard = directory / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, Path]:
    """The tiny model in both codes."""
    folder = tmp_path_factory.mktemp("quantized")
    for code in ("trellis", "split"):
        result = septet("quantize", tiny_model_dir, folder / code, "--code", code, "--effort", 0)
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
    return {code: folder / code for code in ("trellis", "split")}


@pytest.fixture
def broken(quantized: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(quantized["trellis"], tmp_path / "broken"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some windows."""
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text(TEXT)
    return path
