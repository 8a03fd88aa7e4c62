"""Several GPUs of one host at work: a thread for each, since torch lets go of the interpreter while a GPU is told what to do.

And work beside what a GPU does, and the way back to the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

__all__ = ["beside", "on_devices", "to_host"]

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def on_devices(calls: Sequence[tuple[str, Callable[[_Item], _Result], _Item]]) -> list[_Result]:
    """Make calls at the same time.

    Args:
        calls: (device, function, its argument); a device comes once. Threads do not record for a backward pass.

    Returns:
        The results, in order. An error of any call is raised after all have ended.
    """

    def run(device: str, work: Callable[[_Item], _Result], item: _Item) -> _Result:
        here = torch.cuda.device(device) if device.startswith("cuda") else nullcontext()
        with here:
            return work(item)

    def quietly(*call: Any) -> _Result:
        with torch.no_grad():
            return run(*call)

    if len(calls) == 1:
        return [run(*calls[0])]
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(quietly, *call) for call in calls]
        return [future.result() for future in futures]


@contextmanager
def beside(device: str, work: Callable[[], _Result]) -> Iterator[Callable[[], _Result]]:
    """Work in a thread and, on a GPU, in a stream of its own, until the end of the `with`.

    What it writes to must have been there before; what it allocates and returns belongs to its own stream.

    Args:
        device: where.
        work: does not record for a backward pass. On a processor it begins when it is asked for.

    Yields:
        What waits for the work, and returns or raises what the work did.
    """
    if not device.startswith("cuda"):
        yield work
        return
    stream = _side_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def run() -> _Result:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            try:
                return work()
            finally:
                stream.synchronize()

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(run).result


@cache
def _side_stream(device: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory; itself if it is there.

    From a GPU into page-locked memory, which torch uses again: memory that is new to a process takes longer than the way from a GPU.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
