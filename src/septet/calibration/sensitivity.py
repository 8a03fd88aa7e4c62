"""How much errors of each layer matter for a model's predictions: the two sides of its Hessian of the KL divergence.

At the unquantized model the KL divergence of its predictions is quadratic in an error of the weights, and its Hessian is the Fisher
information: with labels drawn from the model's own predictions, and d the gradient of their log loss at a layer's outputs, it is the
mean of (d transpose(d)) x (x transpose(x)) over tokens. It is kept as a product of two sides: the mean of d transpose(d) for the outputs,
in blocks of neighbours, and the mean of |d|^2 x transpose(x), tokens weighed by what depends on them, for the inputs.

Blocks are worked off from the last to the first: forward once more, with gradients, and one step back. Memory: the model, the hidden
states of all windows before every block, and one block's work, on a GPU also the next one's weights. The two sides are stored block by
block and may lie on disk. GPUs take windows in turn, and share the sums.

Reference: Kronecker-factored Fisher information after Martens and Grosse 2015 (arXiv 1503.05671); as two-sided Hessians for rounding after
Tseng et al. 2025 (YAQA, arXiv 2505.22988).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np
import torch
from torch import nn

from septet.calibration.blocks import Chain, find_blocks
from septet.calibration.kept import Sensitivity
from septet.calibration.sums import InputSum, block_grams
from septet.calibration.workers import Machine, each_at_work, map_windows
from septet.model import LayerPlan
from septet.quantize.statistics import output_rows

__all__ = ["measure"]


def measure(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    windows: torch.Tensor,
    seed: int = 0,
    machine: Machine | None = None,
    found: Sensitivity | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Measure the sensitivity of layers.

    Args:
        model: a causal language model with its weights, in eval mode, in the host's memory.
        layers: the plan; layers outside the blocks are left out.
        windows: int64 [windows, tokens], a text; a few thousand tokens do.
        seed: of the drawn labels.
        machine: where; None: the processor. The result does not depend on the number of threads.
        found: where to put it; None: a new one in memory.
        progress: called with blocks done and blocks in all.

    Raises:
        UnsupportedModelError: the blocks are no plain chain.
    """
    model.requires_grad_(False)
    prefix, blocks = find_blocks(model, layers)
    machine = machine or Machine()
    chain, found = Chain(model, blocks, windows, machine), found or Sensitivity()
    # Before every block, behind the last, and their gradients before and behind one.
    states, sets = [chain.hidden], len(blocks) + 3
    with closing(each_at_work(blocks, machine)) as each:
        for index, copies in enumerate(each):

            def work(item: tuple[int, torch.Tensor], i: int = index, copies: dict = copies) -> torch.Tensor:
                return chain.settled(chain.block_output(i, item[1], copies[machine.device_of(item[0])]), sets)

            parts = map_windows(work, list(enumerate(states[-1])), machine, shared=True)
            states.append([moved for part in parts for moved in part])
    gradients = _head_gradients(chain, states.pop(), seed, machine)
    with closing(each_at_work(blocks[::-1], machine)) as each:
        for index, copies in zip(reversed(range(len(blocks))), each):
            members = [layer for layer in layers if layer.name.startswith(f"{prefix}.{index}.")]
            step = _Step(chain, index, copies, {layer.name[len(f"{prefix}.{index}.") :]: layer for layer in members}, machine)
            gradients = step.run(states.pop(), gradients)
            found.put(*step.result())
            # Its sums, before the next block's are there too.
            del step
            progress(len(blocks) - index, len(blocks))
    found.settle()
    return found


def _head_gradients(chain: Chain, hidden: list[torch.Tensor], seed: int, machine: Machine) -> list[torch.Tensor]:
    """The gradient of drawn labels' log loss, summed over tokens, behind the last block: like `hidden`."""

    def work(number: int) -> torch.Tensor:
        state = hidden[number].detach().to(machine.device).requires_grad_(True)
        scores = torch.log_softmax(chain.logits(chain.windows[number], state), -1)
        generator = torch.Generator(machine.device).manual_seed(seed * 1_000_003 + number)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        return chain.settled(torch.autograd.grad(-scores.gather(1, drawn).sum(), state)[0])

    with chain.recorders():
        return [gradient for part in map_windows(work, range(len(hidden)), machine, gradients=True) for gradient in part]


class _Step:
    """One block: sums over windows of what its layers see in both directions.

    Args:
        chain: of the model.
        index: of the block.
        copies: of the block, by device.
        layers: to measure, by their names within the block.
        machine: where.
    """

    def __init__(self, chain: Chain, index: int, copies: dict[str, nn.Module], layers: dict[str, LayerPlan], machine: Machine) -> None:
        self._chain, self._index, self._copies, self._layers, self._machine = chain, index, copies, layers, machine
        self._inputs = {layer.group: InputSum(layer.shape[1], machine.devices) for layer in layers.values()}
        self._outputs: dict[str, torch.Tensor] = {}
        busy = dict.fromkeys(machine.devices, 0)
        for layer in sorted(layers.values(), key=lambda layer: -layer.shape[0]):
            device, rows = min(busy, key=busy.__getitem__), output_rows(layer.shape[0])
            busy[device] += layer.shape[0] * rows
            self._outputs[layer.name] = torch.zeros((layer.shape[0] // rows, rows, rows), dtype=torch.float64, device=device)
        self._tokens = 0

    def run(self, hidden: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Add up all windows; returns the gradients before the block, where the chain lets them wait."""
        seen = threading.local()
        hooks = [
            block.get_submodule(name).register_forward_hook(_Watcher(layer.name, seen))
            for block in self._copies.values()
            for name, layer in self._layers.items()
        ]

        def work(item: tuple[int, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
            seen.calls, device = [], self._machine.device_of(item[0])
            state, gradient = (tensor.detach().to(device, non_blocking=True) for tensor in item[1:])
            state.requires_grad_(True)
            output = self._chain.block_output(self._index, state, self._copies[device])
            wanted = [state, *(call[2] for call in seen.calls)]
            found = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
            return self._chain.settled(found[0]), _rows_of(seen.calls, found[1:])

        moved: list[torch.Tensor] = []
        items = list(zip(range(len(hidden)), hidden, gradients))
        try:
            for results in map_windows(work, items, self._machine, gradients=True, shared=True):
                moved += [gradient for gradient, _ in results]
                # One GPU gives the windows one by one, several a few together; sums must not know.
                for windows in [[result] for result in results] if self._machine.is_gpu else [results]:
                    self._add([rows for _, rows in windows])
        finally:
            for hook in hooks:
                hook.remove()
        self._tokens = sum(state.shape[:-1].numel() for state in hidden)
        return moved

    def _add(self, windows: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """Add the products of a few windows."""
        shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self._layers.values():
            parts = [rows[layer.name] for rows in windows if layer.name in rows]
            if not parts:
                continue
            inputs, gradient = (torch.cat(rows) if len(rows) > 1 else rows[0] for rows in zip(*parts))
            outputs = self._outputs[layer.name]
            outputs += block_grams(gradient.to(outputs.device), len(outputs))
            weights = _square_sums(gradient)
            mean = weights.mean()
            weights = weights / torch.where(mean == 0, 1.0, mean)
            key = f"{layer.name.rpartition('.')[0]}|{layer.group}"
            earlier = shared.get(key)
            shared[key] = (inputs, weights if earlier is None else earlier[1] + weights)
        for key, (inputs, weights) in shared.items():
            self._inputs[key.split("|", 1)[1]].add(inputs * weights.sqrt()[:, None].float())

    def result(self) -> tuple[dict[str, np.ndarray | torch.Tensor], dict[str, np.ndarray | torch.Tensor]]:
        """The block's two sides, by group and by layer."""
        inputs = {group: total.mean() for group, total in self._inputs.items() if not total.is_empty}
        return inputs, {name: total.div_(max(self._tokens, 1)) for name, total in self._outputs.items()}


class _Watcher:
    """A hook that notes (name, input, output) of a module in the thread's own store."""

    def __init__(self, name: str, seen: threading.local) -> None:
        self._name, self._seen = name, seen

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._seen.calls.append((self._name, arguments[0].detach(), output))


def _rows_of(
    calls: list[tuple[str, torch.Tensor, torch.Tensor]], gradients: Sequence[torch.Tensor | None]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and output gradients, float32 [tokens, K] and [tokens, N], by layer."""
    rows: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for (name, inputs, _), gradient in zip(calls, gradients):
        if gradient is not None and name not in rows:
            rows[name] = inputs.reshape(-1, inputs.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return rows


def _square_sums(rows: torch.Tensor) -> torch.Tensor:
    """The sum of each row's squares, float64 [tokens]."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.einsum("tn,tn->t", rows.numpy(), rows.numpy(), dtype=np.float64))
    return rows.double().square().sum(1)
