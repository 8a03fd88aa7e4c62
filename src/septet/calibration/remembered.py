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
    """Results of a block's children, by name and window.

    Args:
        block: whose children they are.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._calls: dict[str, dict[int, tuple[Any, Any]]] = {}
        self._local = threading.local()

    def window(self, number: int) -> None:
        """Say which window this thread works on from now on."""
        self._local.number = number

    @contextmanager
    def reusing(self, layers: Set[str], done: Set[str], last: bool = False) -> Iterator[None]:
        """Inside this, children all of whose layers are done answer from memory where they can.

        Args:
            layers: names of all layers to quantize, within the block.
            done: those whose weights do not change any more.
            last: there is no pass after this one, so nothing new is remembered.
        """
        finished = {name: module for name, module in self._block.named_children() if _is_finished(name, layers, done)}
        for name, module in finished.items():
            module.forward = self._remembering(name, module.forward, not last)
        try:
            yield
        finally:
            for module in finished.values():
                module.__dict__.pop("forward", None)

    def _remembering(self, name: str, forward: Callable[..., Any], keep: bool) -> Callable[..., Any]:
        """`forward` of a module, unless it has been called for this window with the same arguments."""
        calls = self._calls.setdefault(name, {}) if keep else self._calls.get(name, {})

        def call(*positional: Any, **named: Any) -> Any:
            known = calls.get(self._local.number)
            if known is not None and same_arguments(known[0], (positional, named)):
                return _copied(known[1])
            output = forward(*positional, **named)
            if keep:
                calls[self._local.number] = (positional, named), _copied(output)
            return output

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
