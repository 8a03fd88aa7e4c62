"""Sensitivities in memory or on disk, written and read beside other work.

The two sides of a block are written by threads while the GPU measures the next block; one block waits at most. The files may still be in
the system's memory; `seal` has them on disk before it says that all are there. Symmetric matrices are stored as what lies above their
diagonal.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

import numpy as np
import torch

from septet.errors import CheckpointError
from septet.quantize.executors import workers
from septet.quantize_gpu.devices import on_side_streams, side_stream_waits, to_host

__all__ = ["Sensitivity", "Upper", "load_array", "save_array"]

#: Squares on the diagonal of a symmetric matrix that are stored whole.
_SQUARE = 512
#: Numbers that come from a GPU at a time.
_PIECE = 1 << 24
#: Files that are written at the same time: what one thread does for one of them takes longer than a GPU takes to find what is in it.
_WRITERS = 3
#: Of headers, by version.
_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
#: What damage makes numpy's reader raise besides ValueError.
_DAMAGES = (KeyError, TypeError, SyntaxError, TokenError, OverflowError, RecursionError, MemoryError)
_AGAIN = "delete {} and run the same command with --resume"


class Upper:
    """A symmetric matrix, of which only what lies on and above the squares of the diagonal counts.

    Args:
        array: float32 [K, K], or what `folded` has made of it.
        name: for messages; where it was read from.

    Raises:
        CheckpointError: the array is neither.
    """

    def __init__(self, array: np.ndarray, name: Path | str = "a sensitivity") -> None:
        self._array, self._size = array, len(array)
        if array.ndim == 1:
            self._size = int(array[0]) if len(array) and np.isfinite(array[0]) else 0
            if not 1 <= self._size <= len(array) or len(array) != _folded_size(self._size):
                path = Path(name)
                raise CheckpointError(f"{path.name} must hold a symmetric matrix", f"{array.size} numbers", _AGAIN.format(path.parent))

    def slabs(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, stop, float32 [stop - start, K - start]): neighbouring rows from the square of the diagonal on."""
        position = 1
        for start, stop in _squares(self._size):
            if self._array.ndim == 2:
                yield start, stop, self._array[start:stop, start:]
                continue
            count = (stop - start) * (self._size - start)
            yield start, stop, self._array[position : position + count].reshape(stop - start, -1)
            position += count

    def diagonal(self) -> np.ndarray:
        """float32 [K]."""
        return np.concatenate([slab.diagonal() for _, _, slab in self.slabs()])

    def whole(self) -> np.ndarray:
        """float32 [K, K]."""
        matrix = torch.empty((self._size, self._size))
        for start, stop, slab in self.slabs():
            matrix[start:stop, start:] = torch.from_numpy(slab)
            matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        return matrix.numpy()


class Sensitivity:
    """Both sides, for the layers of a model.

    Args:
        folder: where to keep them; None: in memory. What an earlier `Sensitivity` has kept there is found again.
        beside: write and read ahead in threads, for a GPU that works meanwhile.
    """

    def __init__(self, folder: Path | None = None, beside: bool = False) -> None:
        self._folder, self._beside = folder, beside
        self._arrays: dict[str, np.ndarray] = {}
        self._written: list[Path] = []
        self._waiting: list[Future] = []
        self._ahead: dict[str, Future] = {}
        self._writers, self._reader = workers(beside, _WRITERS), workers(beside)

    def upper(self, group: str) -> Upper | None:
        """float32 [K, K], mean of |d|^2 x transpose(x), each layer of the group counting the same; only its shape matters."""
        found = self._get(f"inputs of {group}")
        return None if found is None else Upper(found, "memory" if self._folder is None else self._file(f"inputs of {group}"))

    def inputs(self, group: str) -> np.ndarray | None:
        """The same as a matrix."""
        found = self.upper(group)
        return None if found is None else found.whole()

    def outputs(self, layer: str) -> np.ndarray | None:
        """float32 [blocks, B, B], mean of d transpose(d) per token, B as `quantize.statistics.output_rows` says."""
        return self._get(f"outputs of {layer}")

    def put(self, inputs: dict[str, np.ndarray | torch.Tensor], outputs: dict[str, np.ndarray | torch.Tensor]) -> None:
        """Keep the two sides of some groups and layers, floats from anywhere. On disk they are after `settle`.

        Raises:
            OSError: what was put before could not be written.
        """
        named = {f"inputs of {group}": _folded(matrix) for group, matrix in inputs.items()}
        named |= {f"outputs of {layer}": _tensor(matrix).float() for layer, matrix in outputs.items()}
        if self._folder is None:
            self._arrays |= {key: to_host(tensor).numpy() for key, tensor in named.items()}
            return
        self.settle()
        for device in {str(tensor.device) for tensor in named.values()}:
            side_stream_waits(device)
        # The largest first, or all would wait for it at the end.
        for key in sorted(named, key=lambda key: -named[key].numel()):
            self._waiting.append(self._writers.submit(self._write, key, named[key]))

    def read_ahead(self, group: str, layers: Sequence[str]) -> None:
        """Begin to read what will be asked for next, if there is a thread for it; what was read and not asked for is forgotten."""
        keys = [f"inputs of {group}", *(f"outputs of {layer}" for layer in layers)]
        self._ahead = {key: self._reader.submit(self._load, key) for key in keys} if self._folder is not None and self._beside else {}

    def seal(self, mark: Path) -> None:
        """Wait until everything is written; begin to wait until it is on disk, and then write an empty array there.

        Raises:
            OSError: something could not be written.
        """
        self.settle()
        self._waiting.append(self._writers.submit(_seal, list(self._written), mark))

    def settle(self, wait: bool = True) -> None:
        """Wait until everything is written; or only see whether something has failed.

        Raises:
            OSError: something could not be written.
        """
        ended = [one for one in self._waiting if wait or one.done()]
        self._waiting = [one for one in self._waiting if one not in ended]
        for one in ended:
            one.result()

    def _write(self, key: str, tensor: torch.Tensor) -> None:
        # Not behind what the GPU has been given to do.
        with on_side_streams(str(tensor.device)):
            _save_unsynced(self._file(key), tensor)
        self._written.append(self._file(key))

    def _get(self, key: str) -> np.ndarray | None:
        ahead = self._ahead.pop(key, None)
        return self._load(key) if ahead is None else ahead.result()

    def _load(self, key: str) -> np.ndarray | None:
        if self._folder is None:
            return self._arrays.get(key)
        page_locked = self._beside and torch.cuda.is_available()
        return load_array(self._file(key), page_locked) if self._file(key).is_file() else None

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _seal(written: list[Path], mark: Path) -> None:
    for path in written:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    save_array(mark, np.zeros(0))


def _squares(size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _SQUARE, size)) for start in range(0, size, _SQUARE))


def _folded_size(size: int) -> int:
    return 1 + sum((stop - start) * (size - start) for start, stop in _squares(size))


def _folded(matrix: np.ndarray | torch.Tensor) -> torch.Tensor:
    """A symmetric matrix, [K, K], without what lies below the squares of its diagonal: K, then slabs of rows; float32 [n], where it is."""
    source = _tensor(matrix)
    size = source.new_full((1,), len(source), dtype=torch.float32)
    return torch.cat([size, *(source[start:stop, start:].float().reshape(-1) for start, stop in _squares(len(source)))])


def _tensor(matrix: np.ndarray | torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(matrix) if isinstance(matrix, np.ndarray) else matrix


def _save_unsynced(path: Path, tensor: torch.Tensor) -> None:
    """`save_array` for a tensor from anywhere, float32, in pieces; a power cut may still damage the file."""
    unfinished, flat = path.with_suffix(".unfinished.npy"), tensor.reshape(-1)
    with open(unfinished, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": tuple(tensor.shape)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, len(flat), _PIECE):
            file.write(memoryview(to_host(flat[start : start + _PIECE]).numpy()).cast("B"))
    os.replace(unfinished, path)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array of any dtype and shape to an .npy file, which appears whole or not at all."""
    unfinished = path.with_suffix(".unfinished.npy")
    with open(unfinished, "wb") as file:
        np.save(file, np.asarray(array, order="C"))
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_array(path: Path, page_locked: bool = False) -> np.ndarray:
    """Read what `save_array` wrote; a file that says more than it holds takes no memory.

    Args:
        path: of the file.
        page_locked: into memory of that kind, from which a GPU reads several times as fast.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file:
            shape, fortran_order, dtype = _read_header(file)
            count, there = math.prod(shape), os.fstat(file.fileno()).st_size - file.tell()
            if fortran_order or dtype.hasobject or count * dtype.itemsize != there:
                raise ValueError(f"{there} bytes for {shape} of {dtype}")
            # Read, not mapped: no page fault for each 4 KiB.
            flat = torch.empty(there, dtype=torch.uint8, pin_memory=page_locked).numpy()
            if file.readinto(flat) != there:
                raise ValueError(f"less than {there} bytes")
            return flat.view(dtype).reshape(shape)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} must hold an array", error, _AGAIN.format(path.parent)) from error


def _read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype; what numpy's reader, which asks Python's, makes of damage is a ValueError."""
    try:
        return _READERS[np.lib.format.read_magic(file)](file)
    except _DAMAGES as error:
        raise ValueError(f"no header of an array: {error}") from error
