"""Statistics for one layer after the other, from the inputs it will really see.

The windows' hidden states wait before the block at work. For each of its groups they run up to that group, through the new weights of
the layers before it; when all its layers have been quantized, they move on. So every layer is calibrated behind all quantized ones before
it. The same windows also go through the unquantized model, to see how far inputs have moved. Memory: the model as it was loaded, less
the blocks that are done; one block in float32; the hidden states twice; all inputs and most outputs of one block's layers; a few
statistics; on GPUs the last three, and hidden states that are not too many. Results do not depend on the number of threads.

Reference: layer by layer after Frantar et al. 2023 (GPTQ, arXiv 2210.17323); moved inputs after Li et al. 2025 (GPTAQ, 2504.02692).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn

from septet import quantize_gpu
from septet.calibration.blocks import Chain, find_blocks
from septet.calibration.kept import Sensitivity, Upper
from septet.calibration.passes import Passes
from septet.calibration.sums import InputSum, ProductSum
from septet.calibration.workers import Machine
from septet.errors import OptionError, UnsupportedModelError
from septet.model import LayerPlan
from septet.quantize import GroupStatistics, QuantizedTensor, dequantize
from septet.quantize.scales import sum_all
from septet.quantize_gpu.uploads import bringing

__all__ = ["Calibrator"]

#: Of a window: the sum of (x_original - x) transpose(x), float32 [K, K]; on a GPU its factors; None if x_original is not known.
_Moved = torch.Tensor | list[tuple[torch.Tensor, torch.Tensor]] | None
#: How much of the inputs' Hessian counts tokens by what depends on them (docs/log.md).
_WEIGHED_SHARE = 0.3


class Calibrator:
    """Goes through a model's blocks while its layers are quantized in their order.

    Args:
        model: a causal language model with its weights, in eval mode; it is used up.
        layers: the plan, groups of a block before those of the next.
        windows: int64 [windows, tokens], the calibration text.
        machine: where; None: the processor. The result does not depend on the number of threads.
        sensitivity: of the layers, from `measure`; None: only inputs are looked at, and how far they have moved is not.

    Raises:
        OptionError: there are no windows.
        UnsupportedModelError: the model has no list of blocks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[LayerPlan],
        windows: torch.Tensor,
        machine: Machine | None = None,
        sensitivity: Sensitivity | None = None,
    ) -> None:
        if windows.ndim != 2 or 0 in windows.shape:
            raise OptionError("calibration must have windows of tokens", list(windows.shape), "give a longer text")
        self._model, self._layers, self._windows = model.requires_grad_(False), list(layers), windows
        self._machine = machine or Machine()
        self._sensitivity = sensitivity
        self._prefix, self._blocks = find_blocks(model, layers)
        self._chain: Chain | None = None
        #: Hidden states before the current block, as in `Chain.hidden`, with quantized and with original weights.
        self._hidden: list[torch.Tensor] = []
        self._original: list[torch.Tensor] = []
        #: Inputs of the current block's layers in the unquantized model, by key, one tensor per window.
        self._original_inputs: dict[str, list[torch.Tensor]] = {}
        #: What a GPU may still be reading when a group's statistics have been given away.
        self._known_last: Upper | None = None
        self._current = -1
        #: Over the current block.
        self._passes: Passes | None = None

    def statistics(self, layers: Sequence[LayerPlan]) -> GroupStatistics | None:
        """What is known of a fused group, after all earlier layers have been taken over.

        Args:
            layers: the group. Groups of a block must be asked for after those of earlier blocks.

        Returns:
            None for layers outside the blocks, and where no token came by. From a GPU: tensors there, which nobody has waited for.

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
        total, drift = self._collect(layers)
        if total.is_empty:
            return None
        if drift is not None:
            # First, or the last GPU would wait with the count for all that the first one is given to do below.
            drift /= total.tokens(drift.device if isinstance(drift, torch.Tensor) else None)
        inputs, known = total.mean(), self._known(layers)
        if known is None:
            return GroupStatistics(inputs)
        self._read_ahead(layers)
        self._known_last = known[0]
        _weigh(inputs, known[0])
        return GroupStatistics(inputs, drift, known[1])

    def forecast(self, layers: Sequence[LayerPlan]) -> GroupStatistics | None:
        """What is known of a group before anything is quantized, from the sensitivity; None where nothing is."""
        known = self._known(layers)
        return None if known is None else GroupStatistics(known[0].whole().astype(np.float64), None, known[1])

    def _read_ahead(self, layers: Sequence[LayerPlan]) -> None:
        """Have the sensitivity of the group behind these layers read while they are quantized."""
        # By name: what is quantized may have other widths than the plan that came first.
        behind = [layer.name for layer in self._layers].index(layers[-1].name) + 1
        following = [layer for layer in self._layers[behind:] if layer.group == self._layers[behind].group]
        if following:
            self._sensitivity.read_ahead(following[0].group, [layer.name for layer in following])

    def _known(self, layers: Sequence[LayerPlan]) -> tuple[Upper, tuple[np.ndarray, ...]] | None:
        """Both sides of a group's sensitivity, float32; None where they are not known."""
        if self._sensitivity is None:
            return None
        inputs, outputs = self._sensitivity.upper(layers[0].group), [self._sensitivity.outputs(layer.name) for layer in layers]
        return None if inputs is None or any(matrix is None for matrix in outputs) else (inputs, tuple(outputs))

    def take_over(self, layer: LayerPlan, quantized: QuantizedTensor) -> None:
        """Let everything after this layer see its quantized weights; layers come in the order of the plan."""
        if self._sensitivity is not None:
            self._sensitivity.settle(wait=layer.name == self._layers[-1].name)
        index = self._block_of(layer)
        if index is None and self._chain is not None:
            return
        while index is not None and self._current < index:
            self._go_on()
        if self._machine.is_gpu and quantized.code == "trellis":
            weight = quantize_gpu.dequantize(quantized, self._machine.device)
        else:
            weight = torch.from_numpy(dequantize(quantized)).to(self._machine.device)
        weight = weight.T.contiguous() if layer.kind == "conv1d" else weight
        if index is None:
            self._model.get_submodule(layer.name).weight = nn.Parameter(weight, requires_grad=False)
        else:
            self._passes.take_over(self._name_within(layer), weight)

    def _block_of(self, layer: LayerPlan) -> int | None:
        """The number of the block that a layer is in, or None."""
        if not layer.name.startswith(f"{self._prefix}."):
            return None
        return int(layer.name[len(self._prefix) + 1 :].split(".", 1)[0])

    def _name_within(self, layer: LayerPlan) -> str:
        """A layer's name without that of its block."""
        return layer.name[len(self._prefix) + 1 :].partition(".")[2]

    def _go_on(self) -> None:
        """Move the hidden states behind the current block, and see what the next one gets in the unquantized model."""
        block = self._blocks[self._current + 1]
        with bringing(block, self._machine.device) if self._machine.is_gpu else nullcontext():
            if self._chain is None:
                self._chain = Chain(self._model, self._blocks, self._windows, self._machine)
                self._hidden = self._chain.hidden
                self._original = self._hidden
            else:
                parts = self._passes.run(self._hidden, {}, lambda number, inputs: None, stop=False)
                self._hidden = [moved for part in parts for _, moved in part]
                # Copies on other GPUs, before those of the next block.
                self._passes = None
                self._blocks[self._current].to("meta")
        self._current += 1
        block.float()
        members = [layer for layer in self._layers if self._block_of(layer) == self._current]
        self._passes = Passes(self._chain, self._current, block, list(map(self._name_within, members)), self._machine)
        if self._sensitivity is not None:
            self._original_inputs, moved = {}, []
            for results in self._passes.run(self._original, self._watched(members), lambda number, inputs: inputs, stop=False):
                moved += [output for _, output in results]
                for inputs, _ in results:
                    for key, rows in inputs.items():
                        self._original_inputs.setdefault(key, []).append(rows)
            self._original = moved

    def _watched(self, layers: Sequence[LayerPlan]) -> dict[str, str]:
        """One module for each input that the layers read, by key: its name within the block.

        Neighbours of one parent read the same input; experts are several parents in one group, each with tokens of its own.
        """
        watched: dict[str, str] = {}
        for layer in layers:
            watched.setdefault(f"{layer.name.rpartition('.')[0]}|{layer.group}", self._name_within(layer))
        return watched

    def _collect(self, layers: Sequence[LayerPlan]) -> tuple[InputSum, np.ndarray | torch.Tensor | None]:
        """Sums over all windows: of x transpose(x), and of (x_original - x) transpose(x) where both are known, on the last GPU."""
        size, watched, on_gpu = layers[0].shape[1], self._watched(layers), self._machine.is_gpu
        total = InputSum(size, self._machine.devices)
        # On a GPU memory counts, and a quarter of the drift is made up for at most.
        drift: ProductSum | torch.Tensor | None = None
        if self._sensitivity is not None:
            backwards = self._machine.devices[::-1]
            drift = ProductSum(size, backwards, torch.float32) if on_gpu else torch.zeros((size, size), dtype=torch.float64)
        for results in self._passes.run(self._hidden, watched, self._with_drift, stop=True):
            # One GPU gives the windows one by one, several a few together; sums must not know.
            for windows in [[result] for result in results] if on_gpu else [results]:
                for key in watched:
                    rows = [inputs[key] for (inputs, _), _ in windows if key in inputs]
                    if rows:
                        total.add(torch.cat(rows) if len(rows) > 1 else rows[0])
                for (_, moved), _ in windows:
                    drift = _with(drift, moved)
        for key in watched:
            self._original_inputs.pop(key, None)
        if isinstance(drift, ProductSum):
            return total, drift.total()
        return total, None if drift is None else drift.numpy()

    def _with_drift(self, number: int, inputs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], _Moved]:
        """The inputs that a window gives, and what `_Moved` says."""
        pairs = []
        for key, rows in inputs.items():
            originals = self._original_inputs.get(key, [])
            # Experts may get other tokens in the unquantized model; there is nothing to compare then.
            if len(originals) != len(self._hidden) or originals[number].shape != rows.shape:
                return inputs, None
            pairs.append((originals[number] - rows, rows))
        if self._machine.is_gpu:
            return inputs, pairs
        return inputs, sum((difference.T @ rows for difference, rows in pairs[1:]), pairs[0][0].T @ pairs[0][1]) if pairs else None


def _with(drift: ProductSum | torch.Tensor | None, moved: _Moved) -> ProductSum | torch.Tensor | None:
    """A drift with that of one window more; None if either is not known."""
    if drift is None or moved is None:
        return None
    if isinstance(drift, torch.Tensor):
        drift += moved
        return drift
    for difference, rows in moved:
        drift.add(difference, rows)
    return drift


def _weigh(inputs: np.ndarray | torch.Tensor, weighed: Upper) -> None:
    """Mix inputs, float64 [K, K], with those weighed by what depends on them, of any magnitude, in place."""
    on_gpu = isinstance(inputs, torch.Tensor)
    other = sum_all(weighed.diagonal().astype(np.float64))
    if not 0 < other < np.inf:
        return
    trace = inputs.trace() if on_gpu else sum_all(np.ascontiguousarray(inputs.diagonal()))
    inputs *= 1 - _WEIGHED_SHARE
    for start, stop, slab in weighed.slabs():
        wide = torch.from_numpy(slab).to(inputs.device, non_blocking=True).double() if on_gpu else slab.astype(np.float64)
        wide *= _WEIGHED_SHARE * trace / other
        inputs[start:stop, start:] += wide
        inputs[stop:, start:stop] += wide[:, stop - start :].T
