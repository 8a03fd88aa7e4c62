"""The chain of blocks in a model, and what it is called with.

To learn this the blocks are taken out for a moment and recorders put in their place: each notes its arguments and hands the hidden
state on. So nothing has to be known about a model but its list of blocks, and nothing but its embedding is computed. What a
recorder is given must be the very tensor that the one before it returned; a model that does something in between is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from septet.errors import UnsupportedModelError
from septet.model import LayerPlan

__all__ = ["Arguments", "find_blocks", "hidden_of", "record"]

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


def record(model: nn.Module, blocks: nn.ModuleList, window: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
    """Run a model up to its first block.

    Args:
        model: everything but its blocks in the dtype to compute in.
        blocks: its blocks, at most the first one of them runs.
        window: int64 [tokens].

    Returns:
        The first block's hidden state [1, tokens, features], and the arguments of each block.

    Raises:
        UnsupportedModelError: the blocks are no plain chain.
    """
    first = _run(model, blocks, window, None, stop_after=1)
    output = blocks[0](first.hidden[0], *first.arguments[0].positional, **first.arguments[0].named)
    rest = output[1:] if isinstance(output, tuple) else None
    chain = _run(model, blocks, window, rest, stop_after=len(blocks))
    if len(chain.arguments) != len(blocks) or any(hidden is not chain.hidden[0] for hidden in chain.hidden):
        got = f"blocks of {type(model).__name__} that do not hand on what they get"
        raise UnsupportedModelError("the blocks of a model to calibrate must form a chain", got, _HINT)
    return chain.hidden[0], chain.arguments


class _Calls:
    """What the recorders have noted: hidden states and arguments, one of each per call."""

    def __init__(self, rest: tuple | None, stop_after: int) -> None:
        self.rest, self.stop_after = rest, stop_after
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
        return hidden if self.rest is None else (hidden, *self.rest)


class _Recorder(nn.Module):
    """Stands in for a block; what else is asked of the block is answered by the block."""

    def __init__(self, block: nn.Module, calls: _Calls) -> None:
        super().__init__()
        # Not a submodule: its weights must not be seen twice.
        self.__dict__["block"], self.__dict__["calls"] = block, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Note the call."""
        return self.calls.note(positional, named)


def _run(model: nn.Module, blocks: nn.ModuleList, window: torch.Tensor, rest: tuple | None, stop_after: int) -> _Calls:
    """Call a model with recorders instead of blocks."""
    calls, real = _Calls(rest, stop_after), list(blocks)
    try:
        for index, block in enumerate(real):
            blocks[index] = _Recorder(block, calls)
        model(input_ids=window[None], use_cache=False)
    except _LastBlock:
        pass
    finally:
        for index, block in enumerate(real):
            blocks[index] = block
    return calls
