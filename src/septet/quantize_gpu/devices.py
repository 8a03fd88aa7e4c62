"""Several GPUs of one host at work: a thread for each, since torch lets go of the interpreter while a GPU is told what to do.

And work beside what a GPU does, and the way back to the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import TypeVar

import torch

__all__ = [
    "aside",
    "beside",
    "in_turn",
    "number_of",
    "on_devices",
    "on_side_streams",
    "side_stream_waits",
    "to_host",
    "wait_for_side_stream",
]

_Item, _Result = TypeVar("_Item"), TypeVar("_Result")


def on_devices(calls: Sequence[tuple[str, Callable[[_Item], _Result], _Item]]) -> list[_Result]:
    """Make calls at the same time, the first one in the caller's thread.

    Args:
        calls: (device, function, its argument); a device comes once. Several do not record for a backward pass.

    Returns:
        The results, in order. An error of any call is raised after all have ended.
    """
    if len(calls) == 1:
        return [_here(*calls[0])]
    futures = [_thread_of(call[0]).submit(_quietly, *call) for call in calls[1:]]
    try:
        first = _quietly(*calls[0])
    finally:
        wait(futures)
    return [first, *(future.result() for future in futures)]


def in_turn(devices: Sequence[str], work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[list[_Result]]:
    """Apply `work` to items, of which each GPU gets the next one; several have a thread each, which is one item ahead of the caller.

    Args:
        devices: where.
        work: as in `on_devices`.
        items: any number.

    Yields:
        The results of one item for each GPU, in order.
    """
    if len(devices) == 1:
        for item in items:
            yield [_here(devices[0], work, item)]
        return
    rounds = [items[start : start + len(devices)] for start in range(0, len(items), len(devices))]
    before = []
    for part in [*rounds, []]:
        futures = [_thread_of(device).submit(_quietly, device, work, item) for device, item in zip(devices, part)]
        # What is done with results is never sent in the midst of an item: one GPU would wait there for half of another one's.
        wait(futures)
        if before:
            yield [future.result() for future in before]
        before = futures


def _here(device: str, work: Callable[[_Item], _Result], item: _Item) -> _Result:
    with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
        return work(item)


def _quietly(device: str, work: Callable[[_Item], _Result], item: _Item) -> _Result:
    with torch.no_grad():
        return _here(device, work, item)


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
    side_stream_waits(device)

    def run() -> _Result:
        with torch.no_grad(), torch.cuda.device(device), torch.cuda.stream(stream):
            try:
                return work()
            finally:
                stream.synchronize()

    future = _threads_beside(number_of(device)).submit(run)
    try:
        yield future.result
    finally:
        wait([future])


@contextmanager
def aside(*devices: str) -> Iterator[None]:
    """Send what is inside the `with` to streams of their own, beside what the GPUs have been given to do; what is sent later waits for it.

    Nothing inside may need anything that is under way. What is allocated inside must be kept until the GPU has been waited for.
    """
    with on_side_streams(*devices):
        yield
    for device in devices:
        wait_for_side_stream(device)


@contextmanager
def on_side_streams(*devices: str) -> Iterator[None]:
    """`aside`, but what is sent later waits only after `wait_for_side_stream`."""
    with ExitStack() as streams:
        for device in devices:
            if device.startswith("cuda"):
                streams.enter_context(torch.cuda.stream(_side_stream(device)))
        yield


def wait_for_side_stream(device: str) -> None:
    """Let what is sent to a device later wait for what its side stream was given; nothing on a processor."""
    if device.startswith("cuda"):
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))


def side_stream_waits(device: str) -> None:
    """Let what its side stream is given later wait for what a device has been sent; nothing on a processor."""
    if device.startswith("cuda"):
        _side_stream(device).wait_stream(torch.cuda.current_stream(device))


def number_of(device: str) -> int:
    """The number of a GPU; "cuda" is the thread's current one."""
    number = torch.device(device).index
    return torch.cuda.current_device() if number is None else number


def _side_stream(device: str) -> torch.cuda.Stream:
    return _side_stream_of(number_of(device))


@cache
def _side_stream_of(number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(number)


@cache
def _thread_of(device: str) -> ThreadPoolExecutor:
    """One for all that is ever shared: a new thread took 4 ms before it had told a GPU anything (docs/log.md)."""
    return ThreadPoolExecutor(1)


@cache
def _threads_beside(number: int) -> ThreadPoolExecutor:
    """Three at most: a group's weights, the block that it is in, and what a model's first block needs come at the same time."""
    return ThreadPoolExecutor(3)


def to_host(tensor: torch.Tensor, wait: bool = True) -> torch.Tensor:
    """A tensor in the host's memory; itself if it is there.

    From a GPU into page-locked memory, which torch uses again: memory that is new to a process takes longer than the way from a GPU.

    Args:
        tensor: anywhere.
        wait: False: it is only on its way, for those who send it back in the same stream.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=not wait)
