"""Work that is repeated with other contents of the same tensors, sent to a GPU as one CUDA graph."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache

import torch

__all__ = ["Repeated"]

#: One thread records at a time: recording asks things of the allocators of all GPUs.
_RECORDING = threading.Lock()


class Repeated:
    """Calls a function again and again. On a GPU the first call runs it, the second records it, and later ones only replay.

    Args:
        work: reads and writes tensors that stay where they are; it must not wait for the GPU.
        device: of the tensors; the thread's current one.
        warm: whether the first call may be recorded, too: what a function makes at its first call and keeps is not there afterwards.
    """

    def __init__(self, work: Callable[[], None], device: torch.device, warm: bool = False) -> None:
        self._work, self._device = work, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._warm = warm

    def __call__(self) -> None:
        if self._device.type != "cuda" or not self._warm:
            self._work()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._recorded()
        self._graph.replay()

    def _recorded(self) -> torch.cuda.CUDAGraph:
        graph, stream, current = torch.cuda.CUDAGraph(), _recording_stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        with _RECORDING, torch.cuda.stream(stream):
            # Other threads may go on calling what a recording forbids to its own.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                self._work()
            finally:
                graph.capture_end()
        current.wait_stream(stream)
        return graph


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """Always the same: torch gives out 32 streams in turn, and another thread might be at work in one of them."""
    return torch.cuda.Stream(device)
