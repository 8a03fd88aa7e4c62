"""Blocks of a model that is too large for a GPU, each there only while it is called.

While one block works, a thread copies the next one into page-locked memory, from where it travels beside the computation: twice as fast
as from anywhere else, or more. Several GPUs take blocks in turn, each over its own way to the host's memory, and hidden states go from one
to the next. Of each GPU's memory two blocks' worth is taken, and as much page-locked memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from septet.calibration.blocks import moved

__all__ = ["Fetching"]

#: Every tensor begins at a multiple of so many bytes of the page-locked memory.
_ALIGNED = 256


class Fetching:
    """Hooks of blocks that are called one after the other, again and again, until `remove`.

    Args:
        blocks: in the host's memory, in the order of their calls.
        devices: where they work: block i on device i modulo their number. What the last block returns comes to the first device.
    """

    def __init__(self, blocks: Sequence[nn.Module], devices: Sequence[str]) -> None:
        self._first = devices[0]
        self._tensors = [_tensors_of(block) for block in blocks]
        count = min(len(devices), len(blocks))
        at_home = [[tensor.data for tensor in tensors] for tensors in self._tensors]
        self._ways = [_Way(device, at_home[number::count]) for number, device in zip(range(count), devices)]
        self._at_home: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hooks = []
        for number, block in enumerate(blocks):
            enter, leave = partial(self._enter, number), partial(self._leave, number)
            self._hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
            self._hooks.append(block.register_forward_hook(leave))

    def remove(self) -> None:
        """Leave the blocks as they were."""
        for way in self._ways:
            way.close()
        self._home()
        for hook in self._hooks:
            hook.remove()

    def _enter(self, number: int, block: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        way = self._ways[number % len(self._ways)]
        self._at_home = [(tensor, tensor.data) for tensor in self._tensors[number]]
        for tensor, data in zip(self._tensors[number], way.take()):
            tensor.data = data
        return moved(arguments, way.device), moved(named, way.device)

    def _leave(self, number: int, block: nn.Module, arguments: tuple, output: Any) -> Any:
        self._home()
        return moved(output, self._first) if number == len(self._tensors) - 1 else None

    def _home(self) -> None:
        for tensor, data in self._at_home:
            tensor.data = data
        self._at_home = []


class _Way:
    """To one device, for its share of the blocks, which are taken in turn.

    Args:
        device: where to.
        blocks: the tensors of each, in the host's memory.
    """

    def __init__(self, device: str, blocks: list[list[torch.Tensor]]) -> None:
        self.device, self._on_gpu, self._blocks = torch.device(device), device.startswith("cuda"), blocks
        size = max(sum(map(_room, tensors)) for tensors in blocks)
        self._staged = [torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        self._stream = torch.cuda.Stream(self.device) if self._on_gpu else None
        self._sent = [torch.cuda.Event() if self._on_gpu else None for _ in range(2)]
        self._thread, self._number = ThreadPoolExecutor(1), 0
        self._coming: Future = self._thread.submit(self._bring, 0)

    def close(self) -> None:
        """Nothing is brought any more."""
        self._thread.shutdown()

    def take(self) -> list[torch.Tensor]:
        """The next block's tensors on the device, for its current stream; the one after it begins to come."""
        there, sent = self._coming.result()
        if sent is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent)
            for tensor in there:
                tensor.record_stream(current)
        self._number += 1
        self._coming = self._thread.submit(self._bring, self._number)
        return there

    def _bring(self, number: int) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """Send a block to the device; returns its tensors there, and when they will have arrived."""
        place = number % len(self._staged)
        there, begin, sent = [], 0, self._sent[place]
        with ExitStack() as context:
            if sent is not None:
                # What was sent from here before has left.
                sent.synchronize()
                context.enter_context(torch.cuda.device(self.device))
                context.enter_context(torch.cuda.stream(self._stream))
            for tensor in self._blocks[number % len(self._blocks)]:
                staged = self._staged[place][begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                staged.copy_(tensor)
                # Never the staged memory itself, where that is no other device.
                there.append(staged.to(self.device, non_blocking=True, copy=True))
                begin += _room(tensor)
            if sent is not None:
                sent.record(self._stream)
        return there, sent


def _tensors_of(block: nn.Module) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}.values())


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED
