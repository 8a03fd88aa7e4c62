"""Checksums of a checkpoint: CRC-32 of every tensor (in config.json), SHA-256 of every file and header (in septet.json)."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from septet.checkpoint.tensor_file import TensorFile, open_tensor_file
from septet.errors import CheckpointError

__all__ = ["HASHES_NAME", "check_crc32", "crc32_of_tensor", "crc32_text", "hashes_of", "sha256_of_file"]

HASHES_NAME = "septet.json"
_READ_BYTES = 1 << 22
#: Files whose SHA-256 is computed at the same time: a disk reads several times as fast as a processor hashes.
_FILES_AT_ONCE = 4


def crc32_text(array: np.ndarray, before: str = "00000000") -> str:
    """CRC-32 of an array's bytes as they are stored (C order, little-endian): eight hexadecimal digits.

    Args:
        array: any dtype, C-contiguous.
        before: checksum of the bytes before these, to go on with.
    """
    return f"{zlib.crc32(memoryview(array.reshape(-1).view(np.uint8)), int(before, 16)):08x}"


def crc32_of_tensor(file: TensorFile, key: str) -> str:
    """CRC-32 of a stored tensor, read piece by piece: eight hexadecimal digits."""
    checksum = "00000000"
    for piece in file.pieces(key):
        checksum = crc32_text(piece, checksum)
    return checksum


def check_crc32(array: np.ndarray, expected: str, key: str) -> None:
    """Raise unless an array has the checksum that config.json lists for it.

    Raises:
        CheckpointError: it has another one.
    """
    found = crc32_text(array)
    if found != expected:
        raise CheckpointError(f"{key} must have the CRC {expected} of config.json", found, "the file is damaged; fetch it again")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits.

    Raises:
        CheckpointError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path.name} must be readable", error.strerror or error, f"check {path.parent}") from error
    return digest.hexdigest()


def hashes_of(path: Path, shards: Iterable[str], others: Iterable[str]) -> dict[str, dict[str, str]]:
    """What septet.json says of the files of a checkpoint.

    Args:
        path: the checkpoint.
        shards: names of its safetensors files.
        others: names of the other files, relative to it.

    Returns:
        `headers`, the SHA-256 of each shard's header; `files`, that of each file.

    Raises:
        CheckpointError: one cannot be read, or is no safetensors file.
    """
    shards = sorted(shards)
    names = sorted({*shards, *others})
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        hashes = dict(zip(names, pool.map(lambda name: sha256_of_file(path / name), names)))
    return {"headers": {name: open_tensor_file(path / name).header_sha256 for name in shards}, "files": hashes}
