"""A .gguf file is looked at before a library reads it: damage and lies are errors of three parts, and take no memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from septet.checkpoint.gguf_file import check_gguf_file
from septet.errors import CheckpointError

#: float32, and blocks of 32 weights in 18 bytes.
BLOCKS = {0: (1, 4), 2: (32, 18)}
HUGE = (1 << 64) - 1


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(inner: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IQ", inner, count) + content


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


ENTRIES = (
    entry("general.architecture", 8, text("llama")),
    entry("general.alignment", 4, struct.pack("<I", 64)),
    entry("llama.rope", 6, struct.pack("<f", 1e4)),
    entry("tokens", 9, array(8, 2, text("a") + text("é"))),
    entry("scores", 9, array(6, 3, bytes(12))),
)
TENSORS = (tensor("norm.weight", (8,), 0, 0), tensor("head.weight", (32, 2), 2, 64))


def whole(entries: tuple[bytes, ...] = ENTRIES, tensors: tuple[bytes, ...] = TENSORS, version: int = 3, data: int = 64 + 36) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(entries)) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 64) + bytes(data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_whole_file_passes_and_every_shorter_one_is_refused(file: Path) -> None:
    content = whole()
    file.write_bytes(content)
    check_gguf_file(file, BLOCKS)
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"must .*, got .*; .*copy (it|the file) again"):
            check_gguf_file(file, BLOCKS)
    file.write_bytes(content[:-1])
    check_gguf_file(file)  # where tensors end is known from the library's table only


LIES = {
    "another format": (b"PK\3\4" + bytes(40), "must start with GGUF"),
    "another version": (whole(version=1), "the version must be one of 2, 3"),
    "the other byte order": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "the version must be one of 2, 3"),
    "too many entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, HUGE) + bytes(100), "must lie in the file"),
    "too many tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0) + bytes(100), "must lie in the file"),
    "an endless string": (whole((entry("a", 8, struct.pack("<Q", HUGE)),)), "must lie in the file"),
    "an endless array": (whole((entry("a", 9, array(6, HUGE, b"")),)), "an array that ends behind it"),
    "an endless array of strings": (whole((entry("a", 9, array(8, HUGE, b"")),)), "must lie in the file"),
    "an array of arrays": (whole((entry("a", 9, array(9, 1, bytes(40))),)), "must have a known type"),
    "an unknown type": (whole((entry("a", 13, bytes(8)),)), "must have a known type"),
    "no alignment": (whole((entry("general.alignment", 4, bytes(4)),)), "alignment must be a power of two"),
    "an alignment that is text": (whole((entry("general.alignment", 8, text("x")),)), "alignment must be a 32-bit number"),
    "many dimensions": (whole(tensors=(tensor("a", (1,) * 9, 0, 0),)), "at most 8 dimensions"),
    "an unknown tensor type": (whole(tensors=(tensor("a", (1,), 77, 0),)), "the type of a must be a known one"),
    "a gigantic tensor": (whole(tensors=(tensor("a", (HUGE, HUGE), 0, 0),)), "a must end at byte"),
    "a tensor behind the end": (whole(tensors=(tensor("a", (1,), 0, HUGE),)), "a must end at byte"),
}


@pytest.mark.parametrize("content, message", LIES.values(), ids=LIES)
def test_lies_are_refused(content: bytes, message: str, file: Path) -> None:
    file.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message):
            check_gguf_file(file, BLOCKS)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(4, 330), st.binary(min_size=1, max_size=9))
def test_changed_bytes_are_refused_or_harmless(file: Path, position: int, change: bytes) -> None:
    content = bytearray(whole())
    content[position : position + len(change)] = change
    file.write_bytes(content)
    try:
        check_gguf_file(file, BLOCKS)
    except CheckpointError as error:
        assert error.hint


def test_a_file_that_is_not_there(file: Path, tmp_path: Path) -> None:
    for path in (file, tmp_path):
        with pytest.raises(CheckpointError, match="must be readable, got (No such file|Is a directory)"):
            check_gguf_file(path)
