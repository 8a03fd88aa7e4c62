"""Several GPUs of one host at work: a thread for each, since torch lets go of the interpreter while a GPU is told what to do.

And the way back to the host's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

import torch

__all__ = ["on_devices", "to_host"]

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


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the host's memory; itself if it is there.

    From a GPU into page-locked memory, which torch uses again: memory that is new to a process takes longer than the way from a GPU.
    """
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
