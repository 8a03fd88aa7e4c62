"""What finished parts of a block gave for each window, so that the next pass over the block need not compute them again.

A block runs several times while its layers are quantized: each time a little further. What lies before the group at work does not change
any more, so it is computed once. A part is asked again as soon as it is called with anything else than last time. To compare means to wait
for a GPU, so there only the first window of a pass is compared, and says for all of them whether the part still gets what it got.
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
        device: a GPU, where windows come one after the other; "cpu": in any order.
        settled: puts a result of a GPU where it waits, perhaps where it is.
    """

    def __init__(
        self, block: nn.Module, device: str = "cpu", settled: Callable[[torch.Tensor], torch.Tensor] = lambda result: result
    ) -> None:
        self._block, self._device, self._settled = block, device, settled
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
        #: On a GPU: whether the first call of this pass was as last time. On a processor threads call side by side.
        first_same: bool | None = None

        def call(*positional: Any, **named: Any) -> Any:
            nonlocal first_same
            known, compared = calls.get(self._local.number), first_same is None
            same = known is not None and (same_arguments(known[0], (positional, named)) if compared else first_same)
            if self._device != "cpu" and compared:
                first_same = same
            if same:
                return _each(known[1], lambda kept: kept.to(self._device, non_blocking=True, copy=True))
            output = forward(*positional, **named)
            if keep and (self._device == "cpu" or _bytes_of(output) <= _bytes_of([*positional, *named.values()])):
                calls[self._local.number] = (positional, named) if compared else None, _each(output, self._kept)
            return output

        return call

    def _kept(self, result: torch.Tensor) -> torch.Tensor:
        """What nobody else changes."""
        there = self._settled(result)
        return there.clone() if there is result else there


def _is_finished(name: str, layers: Set[str], done: Set[str]) -> bool:
    """Whether a module is or holds layers to quantize, and all of them are done."""
    inside = {layer for layer in layers if layer == name or layer.startswith(f"{name}.")}
    return bool(inside) and inside <= done


def _each(output: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What becomes of the tensors of a result, which a caller may change."""
    if isinstance(output, torch.Tensor):
        return change(output)
    return type(output)(_each(one, change) for one in output) if type(output) in (tuple, list) else output


def _bytes_of(values: Any) -> int:
    """Of the tensors among some values; attention weights are many times what attention is called with, and not worth their room."""
    if isinstance(values, torch.Tensor):
        return values.nbytes
    return sum(map(_bytes_of, values)) if isinstance(values, tuple | list) else 0
