"""Blocks of a model that is too large for a GPU, each there only while it is called.

While one block works, a thread copies the next one into page-locked memory, from where it travels beside the computation: twice as fast
as from anywhere else, or more. Two blocks' worth of such memory is taken, and of the GPU's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn

from septet.quantize_gpu.uploads import tensors_of

__all__ = ["Fetching"]

#: Every tensor begins at a multiple of so many bytes of the page-locked memory.
_ALIGNED = 256


class Fetching:
    """Hooks of blocks that are called one after the other, again and again, until `remove`.

    Args:
        blocks: in the host's memory, in the order of their calls.
        device: where they work.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: str) -> None:
        self._device, self._on_gpu = torch.device(device), device.startswith("cuda")
        self._tensors = [tensors_of([block]) for block in blocks]
        size = max(sum(map(_room, tensors)) for tensors in self._tensors)
        self._staged = [torch.empty(size, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        self._stream = torch.cuda.Stream(self._device) if self._on_gpu else None
        self._sent = [torch.cuda.Event() if self._on_gpu else None for _ in range(2)]
        self._places = 0
        self._at_home: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._thread = ThreadPoolExecutor(1)
        self._hooks = []
        for number, block in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(partial(self._enter, number)))
            self._hooks.append(block.register_forward_hook(self._leave))
        self._coming: Future = self._thread.submit(self._bring, 0)

    def remove(self) -> None:
        """Leave the blocks as they were."""
        self._thread.shutdown()
        self._home()
        for hook in self._hooks:
            hook.remove()

    def _bring(self, number: int) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """Send a block to the GPU; returns its tensors there, and when they will have arrived."""
        place = self._places % len(self._staged)
        self._places += 1
        there, begin, sent = [], 0, self._sent[place]
        with ExitStack() as context:
            if sent is not None:
                # What was sent from here before has left.
                sent.synchronize()
                context.enter_context(torch.cuda.device(self._device))
                context.enter_context(torch.cuda.stream(self._stream))
            for tensor in self._tensors[number]:
                staged = self._staged[place][begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                staged.copy_(tensor.data)
                # Never the staged memory itself, where that is no other device.
                there.append(staged.to(self._device, non_blocking=True, copy=True))
                begin += _room(tensor)
            if sent is not None:
                sent.record(self._stream)
        return there, sent

    def _enter(self, number: int, block: nn.Module, arguments: tuple) -> None:
        there, sent = self._coming.result()
        if sent is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(sent)
            for tensor in there:
                tensor.record_stream(current)
        self._at_home = [(tensor, tensor.data) for tensor in self._tensors[number]]
        for tensor, data in zip(self._tensors[number], there):
            tensor.data = data
        self._coming = self._thread.submit(self._bring, (number + 1) % len(self._tensors))

    def _leave(self, block: nn.Module, arguments: tuple, output: object) -> None:
        self._home()

    def _home(self) -> None:
        for tensor, data in self._at_home:
            tensor.data = data
        self._at_home = []


def _room(tensor: torch.Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNED) * _ALIGNED
