"""Matrices and blocks of a model on their way to a GPU: threads read pieces into page-locked memory, each sent while others are read.

Nothing passes through memory that is new to the process, which would take longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from queue import SimpleQueue

import numpy as np
import torch
from torch import nn

from septet.quantize.tensor import RowSource
from septet.quantize_gpu.devices import beside

__all__ = ["bringing", "copying", "tensors_of", "upload"]

#: Bytes of a piece, and how many there are; a thread for each. Smaller pieces keep the interpreter from threads that send work to GPUs.
_PIECE = 1 << 24
_PIECES = 6

#: Fills uint8 `out` with the bytes from `start` on: source(start, out).
Source = Callable[[int, np.ndarray], None]


class _Staging:
    """Pieces of page-locked memory, used in turn.

    Args:
        device: where everything goes.
    """

    def __init__(self, device: str | torch.device) -> None:
        self._device = torch.device(device)
        self._threads, self._free = ThreadPoolExecutor(_PIECES), SimpleQueue()
        on_gpu = self._device.type == "cuda"
        for _ in range(_PIECES):
            self._free.put((torch.empty(_PIECE, dtype=torch.uint8, pin_memory=on_gpu), torch.cuda.Event() if on_gpu else None))

    def send(self, source: Source, there: torch.Tensor) -> None:
        """Fill uint8 `there`, on the device, for the current stream. The source has been read when this returns."""
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None

        def piece(start: int) -> None:
            part, (staged, sent) = there[start : start + _PIECE], self._free.get()
            try:
                if sent is not None:
                    # What was sent from here before has left.
                    sent.synchronize()
                source(start, staged.numpy()[: len(part)])
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    part.copy_(staged[: len(part)], non_blocking=True)
                if sent is not None:
                    sent.record(stream)
            finally:
                self._free.put((staged, sent))

        list(self._threads.map(piece, range(0, len(there), _PIECE)))


def upload(weight: RowSource, there: torch.Tensor) -> None:
    """Fill float32 [N, K], on a device, with a matrix; one stored as bfloat16 is widened there."""
    if not getattr(weight, "is_bfloat16", False):
        there.copy_(torch.from_numpy(np.ascontiguousarray(weight[:])))
        return
    narrow = torch.empty_like(there, dtype=torch.bfloat16)
    _send(weight.bfloat16_bytes, narrow.view(-1).view(torch.uint8))
    there.copy_(narrow)


def tensors_of(modules: Sequence[nn.Module]) -> list[torch.Tensor]:
    """Parameters and buffers, each once."""
    return list({id(tensor): tensor for module in modules for tensor in (*module.parameters(), *module.buffers())}.values())


@contextmanager
def bringing(module: nn.Module, device: str) -> Iterator[None]:
    """Move the tensors of a module from the host's memory to a device, with their dtypes, beside what is done inside the `with`.

    They are there at its end, and where they were until then.
    """
    tensors = tensors_of([module])
    with copying(tensors, device) as copied:
        yield
        copies = copied()
    for tensor, place in zip(tensors, copies):
        tensor.data = place


@contextmanager
def copying(tensors: Sequence[torch.Tensor], device: str) -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Copy tensors from the host's memory to a device, with their dtypes, beside what is done inside the `with`.

    Yields:
        What waits for the copies, and returns them. A tensor that is on a GPU already, since several parts of a model share it, is only
        sent to the device, if that is another one.
    """
    at_home = [tensor.device.type == "cpu" for tensor in tensors]
    sources = [tensor.data.contiguous() if home else tensor.data for tensor, home in zip(tensors, at_home)]
    there = [torch.empty_like(source, device=device) if home else source.to(device) for source, home in zip(sources, at_home)]

    def fill() -> list[torch.Tensor]:
        for source, place, home in zip(sources, there, at_home):
            if home:
                here = source.view(-1).view(torch.uint8).numpy()
                _send(lambda start, out, here=here: np.copyto(out, here[start : start + len(out)]), place.view(-1).view(torch.uint8))
        return there

    with beside(device, fill) as copied:
        yield copied


def _send(source: Source, there: torch.Tensor) -> None:
    """Fill uint8 [n] on a device."""
    _staging(str(there.device)).send(source, there)


@cache
def _staging(device: str) -> _Staging:
    return _Staging(device)
