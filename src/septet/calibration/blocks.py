"""The chain of blocks in a model, and what it is called with.

To learn this the blocks are taken out for a moment and recorders put in their place: each notes its arguments and hands the hidden
state on. So nothing has to be known about a model but its list of blocks, and nothing but its embedding is computed. What a
recorder is given must be the very tensor that the one before it returned; a model that does something in between is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from septet.calibration.workers import Machine, at_work
from septet.errors import UnsupportedModelError
from septet.model import LayerPlan
from septet.quantize_gpu.devices import to_host

__all__ = ["Arguments", "Chain", "find_blocks", "hidden_of", "same_arguments"]

#: Tokens that a GPU computes at a time, in whole windows.
_TOKENS_TOGETHER = 2048
#: Hidden states that take no more bytes stay on GPUs; others wait in the host's memory.
_MOST_BYTES_ON_GPUS = 5 << 30
#: Where there would be room for so many sets of them: four are there at most, and what else is there grows with them.
_SETS = 16
_HINT = "quantize it without calibration"


@dataclass(frozen=True, eq=False)
class Arguments:
    """What a block gets besides the hidden state."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


class _LastBlock(Exception):
    """The last block has been reached; the rest of the model need not run."""


def find_blocks(model: nn.Module, layers: Iterable[LayerPlan]) -> tuple[str, nn.ModuleList]:
    """The list of blocks that holds most of the layers to quantize, and its name.

    Raises:
        UnsupportedModelError: there is none.
    """
    names = [layer.name for layer in layers]
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    held = {name: sum(layer.startswith(f"{name}.") for layer in names) for name in lists}
    best = max(held, key=held.__getitem__, default=None)
    if best is None or not held[best]:
        raise UnsupportedModelError("a model to calibrate must have a list of blocks", f"none in {type(model).__name__}", _HINT)
    return best, lists[best]


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden state in what a block returns."""
    return output[0] if isinstance(output, tuple) else output


class Chain:
    """The blocks of a model, and the hidden states of some windows on their way through them.

    Args:
        model: a causal language model with its weights.
        blocks: its blocks, at most the first one of them runs here.
        windows: int64 [windows, tokens].
        machine: where it runs.

    Attributes:
        windows: what is computed at a time: int64 [tokens] each; on a GPU a few together, [windows, tokens].
        hidden: before the first block, float32 [tokens, features] or [windows, tokens, features] for each of them.
        arguments: of each block; the same for all windows; where the model runs.

    Raises:
        UnsupportedModelError: the blocks are no plain chain, or depend on more than the hidden state.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, windows: torch.Tensor, machine: Machine) -> None:
        self._model, self._blocks, self._real, self._machine = model, blocks, list(blocks), machine
        self._local = threading.local()
        self._rest: tuple | None = None
        self._set_bytes = 0
        inside = {id(parameter) for parameter in blocks.parameters()}
        self._outside = [module for module in model.modules() if not any(id(parameter) in inside for parameter in module.parameters())]
        self.hidden: list[torch.Tensor] = []
        self.arguments: list[Arguments] = []
        with torch.no_grad(), self.recorders(), at_work(self._real[:1], machine):
            for window in windows:
                hidden, arguments = self._record(window)
                self._set_bytes = 4 * windows.numel() * hidden.shape[-1]
                self.hidden.append(self.settled(hidden[0].float().clone()))
                self.arguments = self.arguments or arguments
                if not same_arguments(self.arguments, arguments):
                    got = f"other arguments for another text in {type(model).__name__}"
                    raise UnsupportedModelError("blocks to calibrate must depend on the hidden state alone", got, _HINT)
        self.windows = list(windows)
        if machine.is_gpu:
            together = max(1, _TOKENS_TOGETHER // windows.shape[1])
            self.windows = list(windows.split(together))
            self.hidden = [torch.stack(self.hidden[start : start + together]) for start in range(0, len(windows), together)]

    def block_output(self, index: int, hidden: torch.Tensor, block: nn.Module | None = None) -> torch.Tensor:
        """What a block makes of one item of `hidden`: the same shape, where the block is; `hidden` may be anywhere.

        Args:
            index: of the block.
            hidden: before it.
            block: a copy of the block, perhaps on another GPU; None: the model's own.
        """
        device = self._machine.device if block is None else next(block.parameters()).device
        arguments, block = self.arguments[index], self._blocks[index] if block is None else block
        there = hidden.reshape(-1, *hidden.shape[-2:]).to(device, non_blocking=True)
        return hidden_of(block(there, *_moved(arguments.positional, device), **_moved(arguments.named, device))).reshape(hidden.shape)

    def settled(self, state: torch.Tensor, sets: int | None = None, wait: bool = True) -> torch.Tensor:
        """A hidden state, or its gradient, where it waits: where it is, or in the host's memory.

        Args:
            state: of some windows.
            sets: so many states of all windows wait; None: a few, for which the host has page-locked memory.
            wait: False: those few may still be on their way, and are read by the same GPU's passes alone.
        """
        if self._machine.is_gpu and (sets or _SETS) * self._set_bytes <= _MOST_BYTES_ON_GPUS:
            return state
        return to_host(state, wait) if sets is None else state.to("cpu")

    @contextmanager
    def recorders(self) -> Iterator[None]:
        """Recorders in place of the blocks, and the rest of the model in float32, until the end of the `with`."""
        try:
            for index, block in enumerate(self._real):
                self._blocks[index] = _Recorder(block, self._local)
            with at_work(self._outside, self._machine):
                yield
        finally:
            for index, block in enumerate(self._real):
                self._blocks[index] = block

    def logits(self, window: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """What the model predicts from the hidden state behind the last block; inside `with recorders()`, in any thread.

        Args:
            window: an item of `windows`; only its shape matters.
            hidden: float32, an item of what `hidden` has become.

        Returns:
            float32 [tokens, vocabulary].
        """
        calls = self._run(window, _Calls(self._rest, None, hidden.reshape(-1, *hidden.shape[-2:])))
        return calls.output.logits.flatten(0, 1).float()

    def _record(self, window: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        """The first block's hidden state [1, tokens, features], and the arguments of each block."""
        if not self.arguments or self._rest is not None:
            first = self._run(window, _Calls(None, 1))
            output = self._real[0](first.hidden[0], *first.arguments[0].positional, **first.arguments[0].named)
            self._rest = output[1:] if isinstance(output, tuple) else None
        chain = self._run(window, _Calls(self._rest, len(self._real)))
        if len(chain.arguments) != len(self._real) or any(hidden is not chain.hidden[0] for hidden in chain.hidden):
            got = f"blocks of {type(self._model).__name__} that do not hand on what they get"
            raise UnsupportedModelError("the blocks of a model to calibrate must form a chain", got, _HINT)
        return chain.hidden[0], chain.arguments

    def _run(self, window: torch.Tensor, calls: _Calls) -> _Calls:
        """Call the model with recorders instead of blocks."""
        self._local.calls = calls
        try:
            calls.output = self._model(input_ids=window.reshape(-1, window.shape[-1]).to(self._machine.device), use_cache=False)
        except _LastBlock:
            pass
        finally:
            self._local.calls = None
        return calls


class _Calls:
    """What the recorders have noted: hidden states and arguments, one of each per call.

    Args:
        rest: what a block returns besides the hidden state.
        stop_after: how many calls to take before the model is stopped; None: run it to its end.
        instead: a hidden state that every call hands on instead of what it got.

    Attributes:
        output: of the model, when it was run to its end.
    """

    def __init__(self, rest: tuple | None, stop_after: int | None, instead: torch.Tensor | None = None) -> None:
        self.rest, self.stop_after, self.instead = rest, stop_after, instead
        self.output: Any = None
        self.hidden: list[torch.Tensor] = []
        self.arguments: list[Arguments] = []

    def note(self, positional: tuple, named: dict) -> Any:
        """Note a call; returns what the block would have returned, with the hidden state unchanged."""
        named = dict(named)
        hidden = positional[0] if positional else named.pop("hidden_states")
        self.hidden.append(hidden)
        self.arguments.append(Arguments(positional[1:], named))
        if len(self.hidden) == self.stop_after:
            raise _LastBlock
        if self.instead is not None:
            hidden = self.instead
        return hidden if self.rest is None else (hidden, *self.rest)


class _Recorder(nn.Module):
    """Stands in for a block; what else is asked of the block is answered by the block."""

    def __init__(self, block: nn.Module, local: threading.local) -> None:
        super().__init__()
        # Not a submodule: its weights must not be seen twice.
        self.__dict__["block"], self.__dict__["local"] = block, local

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Note the call."""
        return self.__dict__["local"].calls.note(positional, named)


def _moved(value: Any, device: torch.device | str) -> Any:
    """Tensors on a device, and tuples, lists and dicts of them; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _moved(one, device) for key, one in value.items()}
    return type(value)(_moved(one, device) for one in value) if type(value) in (tuple, list) else value


def same_arguments(first: object, second: object) -> bool:
    """Whether two calls' arguments are equal: tensors, and tuples, lists and dicts of them, by value."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, Arguments) and isinstance(second, Arguments):
        return same_arguments(first.positional, second.positional) and same_arguments(first.named, second.named)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_arguments, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_arguments(first[key], second[key]) for key in first)
    return type(first) is type(second) and (isinstance(first, torch.nn.Module) or first is second or first == second)
