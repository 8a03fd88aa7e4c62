"""Result files of `quality.py`: parts of texts that can be named, writing in one go, and when an old result still counts."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from septet.bench.provenance import processor_name
from septet.errors import OptionError

__all__ = ["SCHEMA", "Slice", "file_of", "finished", "machine_facts", "save"]

#: Raised when a field changes its meaning.
SCHEMA = 1


@dataclass(frozen=True)
class Slice:
    """A run of bytes of a UTF-8 file.

    Args:
        file: its name, without folders.
        first: first byte.
        stop: byte after the last.
        content: the characters that lie in it as a whole.
    """

    file: str
    first: int
    stop: int
    content: str

    @classmethod
    def read(cls, path: Path, span: tuple[int, int | None]) -> Slice:
        """Read a part of a file.

        Raises:
            OptionError: the file cannot be read, or has no such part.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OptionError("a text must be a readable file", f"{error.strerror}: {path}", "check the path") from error
        first, stop = span[0], len(data) if span[1] is None else span[1]
        if not 0 <= first < stop <= len(data):
            raise OptionError(f"the part must lie within the {len(data)} bytes of {path.name}", f"{first}:{stop}", "choose another part")
        # A character that is cut in two is left out.
        return cls(path.name, first, stop, data[first:stop].decode("utf-8", errors="ignore"))

    @staticmethod
    def parse_range(text: str) -> tuple[int, int | None]:
        """ "FROM:TO" to numbers; either may be left out."""
        first, _, stop = text.partition(":")
        return int(first or 0), int(stop) if stop else None

    def described(self) -> dict[str, object]:
        """What stands in a result file."""
        return {"file": self.file, "bytes": [self.first, self.stop], "sha256": hashlib.sha256(self.content.encode()).hexdigest()}


def file_of(folder: Path, name: str) -> Path:
    """Where the result of a name lies."""
    return folder / f"{name}.json"


def finished(path: Path, protocol: dict) -> bool:
    """Whether a result is there.

    Raises:
        OptionError: it is there, but for another model or text.
    """
    if not path.exists():
        return False
    found = json.loads(path.read_text())["protocol"]
    if found != protocol:
        changed = sorted(key for key in protocol.keys() | found.keys() if found.get(key) != protocol.get(key))
        hint = "use the same text and model, another --out, or --again"
        raise OptionError("results in one folder must have one protocol", f"another {', '.join(changed)} in {path.name}", hint)
    return True


def save(path: Path, result: dict) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps({"schema": SCHEMA} | result, indent=1) + "\n")
    unfinished.rename(path)


def machine_facts(root: Path, command: str) -> dict[str, object]:
    """Where and with what a result was made."""
    return {
        "command": command,
        "commit": _git(root, "rev-parse", "--short=12", "HEAD")
        + ("+changes" if _git(root, "status", "--porcelain", "src", "benchmarks/*.py") else ""),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("numpy", "torch", "transformers")},
        "machine": {"processor": processor_name(), "threads": torch.get_num_threads(), "cpus": os.cpu_count()},
    }


def _git(root: Path, *words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
