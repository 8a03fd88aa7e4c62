"""Where a measurement comes from: the machine, the versions and the commit, as text for a row of a CSV file."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

from septet import __version__
from septet.errors import OptionError

__all__ = ["append_rows", "processor_name", "provenance"]

_LIBRARIES = ("numpy", "torch", "transformers", "llama-cpp-python")
_ROOT = Path(__file__).resolve().parents[3]


def provenance(*command: str) -> dict[str, str]:
    """What stands in every row.

    Args:
        command: the words that make the row again; of absolute paths only the last part is kept.

    Returns:
        machine, instruction_set, versions, commit ("" outside a checkout, "+changes" behind it when it was not clean), command.
    """
    from septet.kernels import native

    installed = {"septet": __version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": f"{processor_name()}, {os.cpu_count()} processors",
        "instruction_set": native.instruction_set(),
        "versions": " ".join(f"{name} {version}" for name, version in installed.items()),
        "commit": _commit(),
        "command": " ".join(Path(word).name if Path(word).is_absolute() else word for word in command),
    }


def append_rows(path: Path, rows: Sequence[dict]) -> None:
    """Append rows to a CSV file; a new file gets a line of names first.

    Args:
        path: created when it is not there.
        rows: all with the same keys.

    Raises:
        OptionError: the file has other columns, or cannot be written.
    """
    names = list(rows[0])
    try:
        fresh = not path.exists() or path.stat().st_size == 0
        if not fresh:
            with path.open(newline="") as file:
                found = next(csv.reader(file), [])
            if found != names:
                raise OptionError(f"{path} must have the columns of these rows", ", ".join(found)[:200], "choose another file")
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, names)
            if fresh:
                writer.writeheader()
            writer.writerows([{name: _short(value) for name, value in row.items()} for row in rows])
    except OSError as error:
        raise OptionError(f"{path} must be writable", error.strerror or error, "choose another file") from error


def _short(value: object) -> object:
    return f"{value:.5g}" if isinstance(value, float) else value


def _commit() -> str:
    if not (_ROOT / ".git").exists():
        return ""
    commit = _git("rev-parse", "--short=12", "HEAD")
    return commit + ("+changes" if commit and _git("status", "--porcelain", "src", "native", "benchmarks/*.py") else "")


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor_name() -> str:
    """The processor's name as Linux knows it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
