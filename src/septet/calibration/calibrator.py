"""Hessians for one layer after the other, from the inputs it will really see.

The windows' hidden states wait before the block at work. Its Hessians are collected in one pass with the block's original weights;
when all its layers have been quantized, a second pass with their new weights moves the hidden states on. So every block is
calibrated behind the quantized ones before it. Memory: the model as it was loaded, less the blocks that are done; one block in
float32 with its Hessians; the hidden states; the inputs of a few windows. Results do not depend on the number of threads.

Reference: layer by layer after Frantar et al. 2023 (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from septet.calibration.blocks import Arguments, find_blocks, hidden_of, record
from septet.calibration.workers import map_windows
from septet.errors import OptionError, UnsupportedModelError
from septet.model import LayerPlan
from septet.quantize import QuantizedTensor, dequantize
from septet.quantize.hessian import HessianSum

__all__ = ["Calibrator"]


class Calibrator:
    """Goes through a model's blocks while its layers are quantized in their order.

    Args:
        model: a causal language model with its weights, in eval mode; it is used up.
        layers: the plan, groups of a block before those of the next.
        windows: int64 [windows, tokens], the calibration text.
        threads: 0 is the default number; the result does not depend on it.

    Raises:
        OptionError: there are no windows.
        UnsupportedModelError: the model has no list of blocks.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerPlan], windows: torch.Tensor, threads: int = 0) -> None:
        if windows.ndim != 2 or 0 in windows.shape:
            raise OptionError("calibration must have windows of tokens", list(windows.shape), "give a longer text")
        self._model, self._layers, self._windows, self._threads = model, list(layers), windows, threads
        self._prefix, self._blocks = find_blocks(model, layers)
        #: Hidden states before the current block, float32 [tokens, features] per window; empty before the first.
        self._hidden: list[torch.Tensor] = []
        self._arguments: list[Arguments] = []
        self._current = -1
        self._sums: dict[str, HessianSum] = {}

    def hessian(self, layers: Sequence[LayerPlan]) -> np.ndarray | None:
        """The Hessian of a fused group, after all earlier blocks have been taken over.

        Args:
            layers: the group. Blocks must be asked for in their order.

        Returns:
            float64 [K, K] per token, in the original basis; None for layers outside the blocks, and where no token came by.

        Raises:
            UnsupportedModelError: the blocks are no plain chain, or are asked for out of order.
        """
        index = self._block_of(layers[0])
        if index is None:
            return None
        if index < self._current:
            got = f"{layers[0].name} after block {self._current}"
            raise UnsupportedModelError("layers to calibrate must come block by block", got, "quantize without calibration")
        while self._current < index:
            self._go_on()
        total = self._sums.get(layers[0].group)
        return total.mean() if total is not None and total.tokens else None

    def take_over(self, layer: LayerPlan, quantized: QuantizedTensor) -> None:
        """Let everything after this layer see its quantized weights."""
        if self._hidden and self._block_of(layer) is None:
            return
        weight = torch.from_numpy(dequantize(quantized))
        module = self._model.get_submodule(layer.name)
        module.weight = nn.Parameter(weight.T.contiguous() if layer.kind == "conv1d" else weight, requires_grad=False)

    def _block_of(self, layer: LayerPlan) -> int | None:
        """The number of the block that a layer is in, or None."""
        if not layer.name.startswith(f"{self._prefix}."):
            return None
        return int(layer.name[len(self._prefix) + 1 :].split(".", 1)[0])

    def _go_on(self) -> None:
        """Move the hidden states behind the current block, and collect the Hessians of the next."""
        if self._current < 0:
            self._embed()
        else:
            self._pass(self._current, {})
            self._blocks[self._current].to("meta")
        self._current += 1
        self._blocks[self._current].float()
        members = [layer for layer in self._layers if self._block_of(layer) == self._current]
        self._sums = {layer.group: HessianSum(layer.shape[1]) for layer in members}
        watched: dict[str, nn.Module] = {}
        for layer in members:
            # Neighbours of one parent read the same input; experts are several parents in one group, each with tokens of its own.
            watched.setdefault(f"{layer.name.rpartition('.')[0]}|{layer.group}", self._model.get_submodule(layer.name))
        self._pass(self._current, watched)

    def _embed(self) -> None:
        """Compute the hidden states before the first block, and learn the arguments of all blocks."""
        inside = {id(parameter) for parameter in self._blocks.parameters()}
        for module in self._model.modules():
            if not any(id(parameter) in inside for parameter in module.parameters()):
                module.float()
        self._blocks[0].float()
        with torch.inference_mode():
            for window in self._windows:
                hidden, arguments = record(self._model, self._blocks, window)
                self._hidden.append(hidden[0].float().clone())
                self._arguments = self._arguments or arguments
                if not _same(self._arguments, arguments):
                    got = f"other arguments for another text in {type(self._model).__name__}"
                    hint = "quantize it without calibration"
                    raise UnsupportedModelError("blocks to calibrate must depend on the hidden state alone", got, hint)

    def _pass(self, index: int, watched: dict[str, nn.Module]) -> None:
        """Run a block over all windows: with modules to watch their Hessians grow, without the hidden states move on."""
        block, arguments, seen = self._blocks[index], self._arguments[index], threading.local()
        hooks = [module.register_forward_pre_hook(_Watcher(key, seen)) for key, module in watched.items()]

        def work(hidden: torch.Tensor) -> tuple[dict[str, np.ndarray], torch.Tensor]:
            seen.inputs = {}
            output = hidden_of(block(hidden[None], *arguments.positional, **arguments.named))
            return seen.inputs, output[0]

        moved: list[torch.Tensor] = []
        try:
            for results in map_windows(work, self._hidden, self._threads):
                for key in watched:
                    inputs = [captured[key] for captured, _ in results if key in captured]
                    if inputs:
                        self._sums[key.split("|", 1)[1]].add(np.concatenate(inputs))
                moved += [output for _, output in results if not watched]
        finally:
            for hook in hooks:
                hook.remove()
        if not watched:
            self._hidden = moved


class _Watcher:
    """A hook that keeps a module's input: float32 [tokens, K] under its key, in the thread's own store."""

    def __init__(self, key: str, seen: threading.local) -> None:
        self._key, self._seen = key, seen

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        rows = arguments[0].reshape(-1, arguments[0].shape[-1]).float().numpy()
        earlier = self._seen.inputs.get(self._key)
        self._seen.inputs[self._key] = rows.copy() if earlier is None else np.concatenate([earlier, rows])


def _same(first: object, second: object) -> bool:
    """Whether arguments are equal, tensors by value."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, Arguments) and isinstance(second, Arguments):
        return _same(first.positional, second.positional) and _same(first.named, second.named)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return type(first) is type(second) and (isinstance(first, torch.nn.Module) or first is second or first == second)
