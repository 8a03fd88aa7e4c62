"""One block run over all windows again and again, while its layers are quantized one after the other.

A machine of several GPUs has a copy of the block on each, and deals out the windows in turn: what a window gives does not depend on where
it was computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from septet.calibration.blocks import Chain
from septet.calibration.remembered import Remembered
from septet.calibration.workers import Machine, copies_of, map_windows

__all__ = ["Passes"]

_Looked = TypeVar("_Looked")


class Passes:
    """Passes over one block.

    Args:
        chain: of the model; the block's own hidden states are given to `run`.
        index: which block.
        block: where the machine computes, in float32.
        layers: names of all its layers to quantize, within the block.
        machine: where.
    """

    def __init__(self, chain: Chain, index: int, block: nn.Module, layers: Sequence[str], machine: Machine) -> None:
        self._chain, self._index, self._machine = chain, index, machine
        self._blocks = copies_of(block, machine)
        # What waits in the host's memory is for the GPU that it is from, so it need not have arrived. A method would be a cycle, and
        # the blocks would stay until somebody looks for those.
        self._settled = partial(chain.settled, wait=False)
        self._remembered = {device: Remembered(one, device, self._settled) for device, one in self._blocks.items()}
        self._layers, self._taken = set(layers), set()

    def take_over(self, name: str, weight: torch.Tensor) -> None:
        """Give a layer its final weight, in the shape that its module has."""
        for device, block in self._blocks.items():
            block.get_submodule(name).weight = nn.Parameter(weight.to(device), requires_grad=False)
        self._taken.add(name)

    def run(
        self,
        hidden: list[torch.Tensor],
        watched: dict[str, str],
        look: Callable[[int, dict[str, torch.Tensor]], _Looked],
        stop: bool,
    ) -> Iterator[list[tuple[_Looked, torch.Tensor | None]]]:
        """Run the block over windows.

        Args:
            hidden: before the block, as in `Chain.hidden`.
            watched: modules whose inputs are wanted, by key: their names within the block.
            look: called in the window's own thread with its number and the inputs by key, float32 [tokens, K].
            stop: stop as soon as all of them have been seen.

        Yields:
            For a few windows at a time, what `look` returns and the hidden state behind the block where the chain lets it wait, or None.
        """
        seen = threading.local()
        hooks = [
            block.get_submodule(name).register_forward_pre_hook(_Watcher(key, seen, len(watched) if stop else 0))
            for block in self._blocks.values()
            for key, name in watched.items()
        ]

        def work(item: tuple[int, torch.Tensor]) -> tuple[_Looked, torch.Tensor | None]:
            seen.inputs, output = {}, None
            device = self._machine.device_of(item[0])
            block = self._blocks[device]
            self._remembered[device].window(item[0])
            with suppress(_SeenAll):
                output = self._settled(self._chain.block_output(self._index, item[1], block))
            return look(item[0], seen.inputs), output

        try:
            with ExitStack() as memories:
                for remembered in self._remembered.values():
                    memories.enter_context(remembered.reusing(self._layers, self._taken, last=not watched))
                yield from map_windows(work, list(enumerate(hidden)), self._machine, shared=True)
        finally:
            for hook in hooks:
                hook.remove()


class _SeenAll(Exception):
    """All inputs that were wanted have been seen; the rest of the block need not run."""


class _Watcher:
    """A hook that keeps a module's input, float32 [tokens, K], under its key in the thread's own store."""

    def __init__(self, key: str, seen: threading.local, enough: int) -> None:
        self._key, self._seen, self._enough = key, seen, enough

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].reshape(-1, arguments[0].shape[-1]).float()
        earlier = self._seen.inputs.get(self._key)
        self._seen.inputs[self._key] = rows.clone() if earlier is None else torch.cat([earlier, rows])
        if len(self._seen.inputs) == self._enough:
            raise _SeenAll
