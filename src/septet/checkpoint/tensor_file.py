"""Reading safetensors files that nobody vouches for.

The header is checked completely before a byte of data is read: its length, its JSON, every dtype, shape and offset, and that the
tensors fill the file without holes or overlaps. After that, reading a tensor cannot leave the file. Data is read piece by piece,
never mapped, so that a 70B checkpoint passes through in bounded memory. bfloat16, which NumPy lacks, is widened here.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from septet.errors import CheckpointError

__all__ = ["DTYPE_BYTES", "FLOAT_DTYPES", "NUMPY_DTYPES", "StoredMatrix", "TensorEntry", "TensorFile", "open_tensor_file"]

#: Bytes per element of every dtype a header may name.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
#: What can be quantized.
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
NUMPY_DTYPES = {"U8": np.dtype("u1"), "I8": np.dtype("i1"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
#: As in the safetensors library; larger headers are an attack or an accident.
_MAX_HEADER_BYTES = 100_000_000
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: dtype as safetensors names it, shape, and the bytes [start, stop) of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been checked.

    Args:
        path: the file.
        entries: key -> where and what it is, in the order of the file.
        header_sha256: SHA-256 of the header's bytes (the JSON, without the length before it).
    """

    path: Path
    entries: dict[str, TensorEntry]
    header_sha256: str

    def read(self, key: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Bytes [start, stop) of a tensor: uint8.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        stop = self.entries[key].size_bytes if stop is None else stop
        data = np.empty(stop - start, np.uint8)
        self.read_into(key, start, data)
        return data

    def read_into(self, key: str, start: int, out: np.ndarray) -> None:
        """Fill uint8 `out` with the bytes of a tensor from `start` on; raises like `read`."""
        entry = self.entries[key]
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start + start)
            done = 0
            while done < len(out):
                count = file.readinto(memoryview(out)[done:])
                if not count:
                    got = f"a file that ends early: {self.path}"
                    raise CheckpointError(f"{key} must have {entry.size_bytes} bytes", got, "fetch it again")
                done += count

    def pieces(self, key: str) -> Iterator[np.ndarray]:
        """The bytes of a tensor, uint8, a few megabytes at a time."""
        size = self.entries[key].size_bytes
        for start in range(0, size, _COPY_BYTES):
            yield self.read(key, start, min(start + _COPY_BYTES, size))


@dataclass(frozen=True)
class StoredMatrix:
    """A two-dimensional tensor on disk that hands out rows as float32; `matrix[:]` is all of it.

    Args:
        file: where it is.
        key: its name there; the dtype must be one of FLOAT_DTYPES.
    """

    file: TensorFile
    key: str
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.file.entries[self.key].shape

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        entry = self.file.entries[self.key]
        row_bytes = self.shape[1] * DTYPE_BYTES[entry.dtype]
        raw = self.file.read(self.key, start * row_bytes, stop * row_bytes)
        return _to_float32(raw, entry.dtype).reshape(stop - start, self.shape[1])

    @property
    def is_bfloat16(self) -> bool:
        """Whether `bfloat16_bytes` can be had."""
        return self.file.entries[self.key].dtype == "BF16"

    def bfloat16_bytes(self, start: int, out: np.ndarray) -> None:
        """A part of the matrix as it is stored, for whoever widens it faster.

        Args:
            start: the first byte.
            out: uint8, filled.

        Raises:
            CheckpointError: the file has become shorter since it was opened.
        """
        self.file.read_into(self.key, start, out)


def _to_float32(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes of a float dtype -> float32, exact but for F64."""
    if dtype == "BF16":
        return (raw.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
    with np.errstate(over="ignore"):
        return raw.view(NUMPY_DTYPES[dtype]).astype(np.float32, copy=False)


def open_tensor_file(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file.

    Raises:
        CheckpointError: the file is missing, truncated, or its header is not exactly what the format asks for.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                got = f"{size} bytes with a header of {length}" if size >= 8 else f"{size} bytes"
                raise CheckpointError(
                    f"{path.name} must hold its whole header", got, f"{path} is truncated or no safetensors file; fetch it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path.name} must be readable", error.strerror or error, f"check {path.parent}") from error
    header = _parse_json(raw, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _lying(path, "__metadata__ must be an object", type(metadata).__name__)
    entries = {key: _parse_entry(key, value, 8 + length, path) for key, value in header.items()}
    _check_cover(entries, 8 + length, size, path)
    return TensorFile(path, entries, hashlib.sha256(raw).hexdigest())


def _lying(path: Path, requirement: str, got: object) -> CheckpointError:
    return CheckpointError(requirement, f"{got} in the header of {path.name}", f"{path} is damaged; fetch it again")


def _parse_json(raw: bytes, path: Path) -> dict:
    """The header as an object; a repeated key or deep nesting is an error."""

    def without_repeats(pairs: list[tuple[str, object]]) -> dict:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a repeated key")
        return dict(pairs)

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise _lying(path, "a header must be JSON", error) from error
    if not isinstance(header, dict):
        raise _lying(path, "a header must be a JSON object", type(header).__name__)
    return header


def _parse_entry(key: str, value: object, data_start: int, path: Path) -> TensorEntry:
    """One entry with its offsets counted from the start of the file."""
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _lying(path, f"{key} must have dtype, shape and data_offsets", str(value)[:80])
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _lying(path, f"{key} must have a known dtype", str(dtype)[:80])
    if not _are_sizes(shape) or len(shape) > 16:
        raise _lying(path, f"{key} must have a shape of whole numbers", str(shape)[:80])
    size = math.prod(shape) * DTYPE_BYTES[dtype]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != size:
        raise _lying(path, f"{key} must have offsets {size} bytes apart", str(offsets)[:80])
    return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _check_cover(entries: dict[str, TensorEntry], data_start: int, size: int, path: Path) -> None:
    """The tensors must fill the rest of the file, each byte once."""
    position = data_start
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise _lying(path, f"{key} must start at byte {position}", entry.start)
        position = entry.stop
    if position != size:
        hint = f"{path} is truncated; fetch it again" if size < position else f"{path} is damaged; fetch it again"
        raise CheckpointError(f"{path.name} must have {position} bytes", size, hint)
