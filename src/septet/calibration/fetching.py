"""Blocks of a model that is too large for a GPU, each there only while it is called.

While one block works the next one travels. Several GPUs take blocks in turn, each over its own way to the host's memory, and hidden states
go from one to the next. Of each GPU's memory two blocks' worth is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from septet.calibration.blocks import moved
from septet.quantize_gpu.uploads import Staging

__all__ = ["Fetching"]


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
        self._staging, self._stream = Staging(device), torch.cuda.Stream(self.device) if self._on_gpu else None
        self._thread, self._number = ThreadPoolExecutor(1), 0
        self._coming: Future = self._thread.submit(self._bring, 0)

    def close(self) -> None:
        """Nothing is brought any more."""
        self._thread.shutdown()
        self._staging.close()

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
        with torch.cuda.stream(self._stream) if self._on_gpu else nullcontext():
            there = [self._sent(tensor) for tensor in self._blocks[number % len(self._blocks)]]
            return there, self._stream.record_event() if self._on_gpu else None

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        there = torch.empty(len(raw), dtype=torch.uint8, device=self.device)
        self._staging.send(lambda start, out: np.copyto(out, raw[start : start + len(out)]), there)
        return there.view(tensor.dtype).view(tensor.shape)


def _tensors_of(block: nn.Module) -> list[torch.Tensor]:
    return list({id(tensor): tensor for tensor in (*block.parameters(), *block.buffers())}.values())
