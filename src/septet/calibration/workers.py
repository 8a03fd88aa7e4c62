"""Windows at work: side by side on the processor, each on one thread, or one after the other on a GPU.

On the processor a product spread over several threads may add in another order than on one. So every window is computed by a single
thread, and results come back in order. A GPU gets one window after the other: it is one queue of work anyway, and so its results do not
depend on anything else either. Several GPUs get one window each at a time. Models stay in the host's memory; `at_work` brings a part of
one to where it is computed, `each_at_work` one after the other to all GPUs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from typing import TypeVar

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from septet.quantize.threads import default_threads
from septet.quantize_gpu.devices import in_turn
from septet.quantize_gpu.uploads import copying, tensors_of

__all__ = ["WINDOWS_AT_ONCE", "Machine", "at_work", "copies_of", "each_at_work", "map_windows"]

#: Windows whose results are held at the same time; fixed, since sums over them are.
WINDOWS_AT_ONCE = 8
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Machine:
    """What a model runs on.

    Args:
        threads: of the processor; 0 is the default number. Results do not depend on it.
        device: "cpu", "cuda", "cuda:1", ... Results do depend on it, in the last bits.
        helpers: more GPUs of the same kind, for work that can be shared. Results do not depend on them.
    """

    threads: int = 0
    device: str = "cpu"
    helpers: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """Where, helpers last."""
        return self.device, *self.helpers

    def device_of(self, item: int) -> str:
        """Where an item is computed that `map_windows` shares."""
        return self.devices[item % len(self.devices)]

    @property
    def is_gpu(self) -> bool:
        """Whether models have to be brought there."""
        return self.device != "cpu"


def map_windows(
    work: Callable[[_Item], _Result], items: Sequence[_Item], machine: Machine, gradients: bool = False, shared: bool = False
) -> Iterator[list[_Result]]:
    """Apply `work` to all items.

    Args:
        work: on the processor it is called in worker threads, with torch on one thread each.
        items: one per window, or for a GPU one per few windows.
        machine: where.
        gradients: let torch record what it needs for a backward pass.
        shared: item i is for GPU i modulo their number, each in a thread of its own; otherwise one GPU does all.

    Yields:
        The results of `WINDOWS_AT_ONCE` items at a time, in order; of one item for each GPU at work.
    """

    def quietly(item: _Item) -> _Result:
        with torch.set_grad_enabled(gradients):
            return work(item)

    if machine.is_gpu:
        devices = machine.devices if shared else machine.devices[:1]
        # The fast backward passes of attention add in any order.
        with sdpa_kernel(SDPBackend.MATH) if gradients else ExitStack():
            yield from in_turn(devices, quietly, items)
        return
    with ThreadPoolExecutor(min(machine.threads or default_threads(), WINDOWS_AT_ONCE)) as pool:
        for start in range(0, len(items), WINDOWS_AT_ONCE):
            with _one_thread_each():
                results = list(pool.map(quietly, items[start : start + WINDOWS_AT_ONCE]))
            yield results


@contextmanager
def at_work(
    modules: Sequence[nn.Module],
    machine: Machine,
    dtype: torch.dtype | None = torch.float32,
    copies: list[torch.Tensor] | None = None,
) -> Iterator[None]:
    """Modules where they are computed, until the end of the `with`; afterwards they are where and what they were.

    Args:
        modules: parts of a model, in the host's memory.
        machine: where.
        dtype: of their floating-point weights meanwhile; None: their own.
        copies: of `tensors_of` them, on the GPU; emptied. None: they are brought.
    """
    before = [(tensor, tensor.data) for tensor in tensors_of(modules)]
    if copies is None:
        copies = _brought([tensor for tensor, _ in before], machine)
    copies.reverse()
    try:
        for tensor, data in before:
            # Not converted before: the processor would do that.
            tensor.data = copies.pop().to(dtype if data.is_floating_point() and dtype else data.dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data


def _brought(tensors: list[torch.Tensor], machine: Machine) -> list[torch.Tensor]:
    """Copies on a GPU; on the processor the tensors' own data."""
    if not machine.is_gpu:
        return [tensor.data for tensor in tensors]
    with copying(tensors, machine.device) as copied:
        return copied()


def copies_of(module: nn.Module, machine: Machine) -> dict[str, nn.Module]:
    """A module that is on the machine's own device, and a copy on each helper: by device, the machine's own first."""
    return {machine.device: module} | {device: copy.deepcopy(module).to(device) for device in machine.helpers}


def each_at_work(modules: Sequence[nn.Module], machine: Machine) -> Iterator[dict[str, nn.Module]]:
    """`at_work` for one part of a model after the other, with its copies: `copies_of`. A GPU gets the next one's tensors meanwhile."""
    coming: list[torch.Tensor] | None = None
    for module, following in zip_longest(modules, modules[1:]):
        ahead = copying(tensors_of([following]), machine.device) if machine.is_gpu and following is not None else nullcontext(lambda: None)
        with at_work([module], machine, copies=coming), ahead as copied:
            copies = copies_of(module, machine)
            try:
                yield copies
            finally:
                # Whoever still has the dict must not keep a GPU's memory.
                copies.clear()
            coming = copied()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """New threads take over torch's number of threads; it is process-wide, so it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
