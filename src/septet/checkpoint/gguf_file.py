"""Checking a .gguf file that nobody vouches for, before a library reads it.

The library follows lengths and counts wherever they lead, past the end of the file too: a damaged count can take all memory. So the
header is walked once here; every string, array and tensor must lie in the file. Nothing is kept.

Reference: the GGUF specification of ggml (MIT licence), docs/gguf.md.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from math import prod
from pathlib import Path

from septet.errors import CheckpointError

__all__ = ["check_gguf_file"]

_VERSIONS = (2, 3)
_HEADER_BYTES = 24
#: Type number -> bytes of a value: integers of 8 to 32 bits, float32, bool, and those of 64 bits.
_SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_UINT32, _STRING, _ARRAY = 4, 8, 9
_MOST_DIMENSIONS = 8
_ALIGNMENT_KEY, _ALIGNMENT = b"general.alignment", 32


def check_gguf_file(path: Path, blocks: Mapping[int, tuple[int, int]] | None = None) -> None:
    """Raise unless a file is a whole GGUF file.

    Args:
        path: the file.
        blocks: tensor type -> (weights, bytes) of a block, as the library `gguf` lists them; None: only the beginnings of tensors are
            checked.

    Raises:
        CheckpointError: it is missing, no GGUF file, of another version, truncated, or says what cannot be.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(_HEADER_BYTES)
            if magic[:4] != b"GGUF":
                raise CheckpointError("a .gguf file must start with GGUF", f"{magic[:4]!r} in {path}", "copy the file again")
            if len(magic) < _HEADER_BYTES:
                raise CheckpointError(
                    f"{path.name} must hold its whole header", f"{len(magic)} bytes", "the file is truncated; copy it again"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                _Header(path, content).check(blocks)
    except OSError as error:
        raise CheckpointError("a .gguf file must be readable", f"{error.strerror}: {path}", "check the path") from error


class _Header:
    """A place in a file that moves on as the header is read."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content, self._at = path, content, 4
        self._alignment = _ALIGNMENT

    def check(self, blocks: Mapping[int, tuple[int, int]] | None) -> None:
        """Walk through everything."""
        version = self._number(4, "the version")
        if version not in _VERSIONS:
            raise self._wrong(f"the version must be one of {', '.join(map(str, _VERSIONS))}", version)
        tensors, entries = self._number(8, "the counts"), self._number(8, "the counts")
        for _ in range(entries):
            self._entry()
        found = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, shape, kind, offset in found:
            size = 0
            if blocks is not None:
                if kind not in blocks:
                    raise self._wrong(f"the type of {name} must be a known one", kind)
                weights, stored = blocks[kind]
                size = prod(shape) * stored // weights
            if start + offset + size > len(self._content):
                got = f"{len(self._content)} bytes in {self._path}"
                raise CheckpointError(f"{name} must end at byte {start + offset + size}", got, "the file is truncated; copy it again")

    def _entry(self) -> None:
        """A key and its value."""
        key = self._string("a key")
        kind = self._number(4, "the type of a value")
        if key == _ALIGNMENT_KEY:
            if kind != _UINT32:
                raise self._wrong("general.alignment must be a 32-bit number", f"type {kind}")
            self._alignment = self._number(4, "general.alignment")
            if not 0 < self._alignment <= 1 << 20 or self._alignment & (self._alignment - 1):
                raise self._wrong("general.alignment must be a power of two", self._alignment)
        elif kind == _ARRAY:
            inner, count = self._number(4, "the type of an array"), self._number(8, "the length of an array")
            if inner == _STRING:
                for _ in range(count):
                    self._string("an array of strings")
            else:
                self._skip(count * self._scalar(inner), "an array")
        elif kind == _STRING:
            self._string("a value")
        else:
            self._skip(self._scalar(kind), "a value")

    def _tensor(self) -> tuple[str, list[int], int, int]:
        """Name, shape, type, and first byte behind the header."""
        name = self._string("the name of a tensor").decode("utf-8", "replace")[:80]
        dimensions = self._number(4, "the dimensions of a tensor")
        if dimensions > _MOST_DIMENSIONS:
            raise self._wrong(f"{name} must have at most {_MOST_DIMENSIONS} dimensions", dimensions)
        shape = [self._number(8, "the shape of a tensor") for _ in range(dimensions)]
        return name, shape, self._number(4, "the type of a tensor"), self._number(8, "the place of a tensor")

    def _scalar(self, kind: int) -> int:
        if kind not in _SCALAR_BYTES:
            raise self._wrong("a value must have a known type", kind)
        return _SCALAR_BYTES[kind]

    def _string(self, what: str) -> bytes:
        length = self._number(8, what)
        start = self._at
        self._skip(length, what)
        return self._content[start : self._at]

    def _number(self, width: int, what: str) -> int:
        """An unsigned number, low byte first."""
        start = self._at
        self._skip(width, what)
        return int.from_bytes(self._content[start : self._at], "little")

    def _skip(self, count: int, what: str) -> None:
        if count > len(self._content) - self._at:
            raise self._wrong("the header must lie in the file", f"{what} that ends behind it, from byte {self._at} on")
        self._at += count

    def _wrong(self, requirement: str, got: object) -> CheckpointError:
        return CheckpointError(f"{requirement} in {self._path.name}", got, f"{self._path} is truncated or damaged; copy it again")
