"""What finished parts of a block gave for each window, so that the next pass over the block need not compute them again.

A block runs several times while its layers are quantized: each time a little further. What lies before the group at work does not change
any more, so it is computed once. A part is asked again as soon as it is called with anything else than last time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from septet.calibration.blocks import same_arguments

__all__ = ["Remembered"]


class Remembered:
    """Results of modules inside one block, by name and window: as many values as the modules return.

    Args:
        block: whose modules they are.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._calls: dict[str, dict[int, tuple[Any, Any]]] = {}
        self._local = threading.local()

    def window(self, number: int) -> None:
        """Say which window this thread works on from now on."""
        self._local.number = number

    @contextmanager
    def reusing(self, layers: Set[str], done: Set[str]) -> Iterator[None]:
        """Inside this, modules that hold quantized layers only answer from memory where they can.

        Args:
            layers: names of all layers to quantize, within the block.
            done: those whose weights do not change any more.
        """
        finished = {name: module for name, module in self._block.named_modules() if name and _is_finished(name, layers, done)}
        # What a remembered module consists of is not asked any more.
        stored = [name for name in finished if name in self._calls]
        for name in stored:
            for inner in [other for other in self._calls if other.startswith(f"{name}.")]:
                del self._calls[inner]
        for name, module in finished.items():
            if not any(name.startswith(f"{outer}.") for outer in stored):
                module.forward = self._remembering(name, module.forward)
        try:
            yield
        finally:
            for module in finished.values():
                module.__dict__.pop("forward", None)

    def _remembering(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` of a module, unless it has been called for this window with the same arguments."""
        calls = self._calls.setdefault(name, {})

        def call(*positional: Any, **named: Any) -> Any:
            known = calls.get(self._local.number)
            if known is None or not same_arguments(known[0], (positional, named)):
                known = (positional, named), forward(*positional, **named)
                calls[self._local.number] = known
            return _copied(known[1])

        return call


def _is_finished(name: str, layers: Set[str], done: Set[str]) -> bool:
    """Whether a module is or holds layers to quantize, and all of them are done."""
    inside = {layer for layer in layers if layer == name or layer.startswith(f"{name}.")}
    return bool(inside) and inside <= done


def _copied(output: Any) -> Any:
    """Tensors that the caller may change."""
    if isinstance(output, torch.Tensor):
        return output.clone()
    return type(output)(map(_copied, output)) if type(output) in (tuple, list) else output
