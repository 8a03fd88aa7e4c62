"""How much errors of each layer matter for a model's predictions: the two sides of its Hessian of the KL divergence.

At the unquantized model the KL divergence of its predictions is quadratic in an error of the weights, and its Hessian is the Fisher
information: with labels drawn from the model's own predictions, and d the gradient of their log loss at a layer's outputs, it is the
mean of (d transpose(d)) x (x transpose(x)) over tokens. It is kept as a product of two sides: the mean of d transpose(d) for the outputs,
in blocks of neighbours, and the mean of |d|^2 x transpose(x), tokens weighed by what depends on them, for the inputs.

Blocks are worked off from the last to the first: forward once more, with gradients, and one step back. Memory: the model, the hidden
states of all windows before every block, and one block's work. The two sides are stored block by block and may lie on disk.

Reference: Kronecker-factored Fisher information after Martens and Grosse 2015 (arXiv 1503.05671); as two-sided Hessians for rounding after
Tseng et al. 2025 (YAQA, arXiv 2505.22988).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from septet.calibration.blocks import Chain, find_blocks
from septet.calibration.workers import map_windows
from septet.model import LayerPlan
from septet.quantize import exact
from septet.quantize.hessian import HessianSum
from septet.quantize.statistics import output_rows

__all__ = ["Sensitivity", "measure", "save_array"]


class Sensitivity:
    """Both sides, for the layers of a model.

    Args:
        folder: where to keep them; None: in memory. What an earlier `Sensitivity` has kept there is found again.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._arrays: dict[str, np.ndarray] = {}

    def inputs(self, group: str) -> np.ndarray | None:
        """float32 [K, K], mean of |d|^2 x transpose(x), each layer of the group counting the same; only its shape matters."""
        return self._get(f"inputs of {group}")

    def outputs(self, layer: str) -> np.ndarray | None:
        """float32 [blocks, B, B], mean of d transpose(d) per token, B as `quantize.statistics.output_rows` says."""
        return self._get(f"outputs of {layer}")

    def put(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        """Keep the two sides of some groups and layers, as float32."""
        named = {f"inputs of {group}": matrix for group, matrix in inputs.items()}
        named |= {f"outputs of {layer}": matrix for layer, matrix in outputs.items()}
        for key, matrix in named.items():
            if self._folder is None:
                self._arrays[key] = matrix.astype(np.float32)
            else:
                save_array(self._file(key), matrix.astype(np.float32))

    def _get(self, key: str) -> np.ndarray | None:
        if self._folder is None:
            return self._arrays.get(key)
        file = self._file(key)
        return np.load(file, allow_pickle=False) if file.is_file() else None

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array of any dtype and shape to an .npy file, which appears whole or not at all."""
    unfinished = path.with_suffix(".unfinished.npy")
    np.save(unfinished, array)
    os.replace(unfinished, path)


def measure(
    model: nn.Module,
    layers: Sequence[LayerPlan],
    windows: torch.Tensor,
    seed: int = 0,
    threads: int = 0,
    found: Sensitivity | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Measure the sensitivity of layers.

    Args:
        model: a causal language model with its weights, in eval mode; parts outside its blocks become float32.
        layers: the plan; layers outside the blocks are left out.
        windows: int64 [windows, tokens], a text; a few thousand tokens do.
        seed: of the drawn labels.
        threads: 0 is the default number; the result does not depend on it.
        found: where to put it; None: a new one in memory.
        progress: called with blocks done and blocks in all.

    Raises:
        UnsupportedModelError: the blocks are no plain chain.
    """
    model.requires_grad_(False)
    prefix, blocks = find_blocks(model, layers)
    chain, found = Chain(model, blocks, windows), found or Sensitivity()
    states = [chain.hidden]
    for index, block in enumerate(blocks):
        dtype = next(block.parameters()).dtype
        block.float()
        states.append([moved for part in map_windows(lambda h, i=index: chain.block_output(i, h), states[-1], threads) for moved in part])
        block.to(dtype)
    gradients = _head_gradients(chain, windows, states.pop(), seed, threads)
    for index in reversed(range(len(blocks))):
        members = [layer for layer in layers if layer.name.startswith(f"{prefix}.{index}.")]
        step = _Step(model, chain, index, members)
        dtype = next(blocks[index].parameters()).dtype
        blocks[index].float()
        gradients = step.run(states.pop(), gradients, threads)
        blocks[index].to(dtype)
        found.put(*step.result())
        progress(len(blocks) - index, len(blocks))
    return found


def _head_gradients(chain: Chain, windows: torch.Tensor, hidden: list[torch.Tensor], seed: int, threads: int) -> list[torch.Tensor]:
    """The gradient of drawn labels' log loss, summed over tokens, behind the last block: float32 [tokens, features] per window."""

    def work(number: int) -> torch.Tensor:
        state = hidden[number].detach().requires_grad_(True)
        scores = torch.log_softmax(chain.logits(windows[number], state), -1)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        return torch.autograd.grad(-scores.gather(1, drawn).sum(), state)[0]

    with chain.recorders():
        return [gradient for part in map_windows(work, range(len(hidden)), threads, gradients=True) for gradient in part]


class _Step:
    """One block: sums over windows of what its layers see in both directions."""

    def __init__(self, model: nn.Module, chain: Chain, index: int, layers: Sequence[LayerPlan]) -> None:
        self._chain, self._index, self._layers = chain, index, layers
        self._modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
        self._inputs = {layer.group: HessianSum(layer.shape[1]) for layer in layers}
        rows = {layer.name: output_rows(layer.shape[0]) for layer in layers}
        self._outputs = {layer.name: np.zeros((layer.shape[0] // rows[layer.name], *2 * (rows[layer.name],))) for layer in layers}
        self._tokens = 0

    def run(self, hidden: list[torch.Tensor], gradients: list[torch.Tensor], threads: int) -> list[torch.Tensor]:
        """Add up all windows; returns the gradients before the block."""
        seen = threading.local()
        hooks = [module.register_forward_hook(_Watcher(name, seen)) for name, module in self._modules.items()]

        def work(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, tuple[np.ndarray, np.ndarray]]]:
            seen.calls = []
            state = pair[0].detach().requires_grad_(True)
            output = self._chain.block_output(self._index, state)
            wanted = [state, *(call[2] for call in seen.calls)]
            found = torch.autograd.grad(output, wanted, pair[1], allow_unused=True)
            return found[0], _rows_of(seen.calls, found[1:])

        moved: list[torch.Tensor] = []
        try:
            for results in map_windows(work, list(zip(hidden, gradients)), threads, gradients=True):
                moved += [gradient for gradient, _ in results]
                self._add([rows for _, rows in results])
        finally:
            for hook in hooks:
                hook.remove()
        self._tokens = sum(map(len, hidden))
        return moved

    def _add(self, windows: list[dict[str, tuple[np.ndarray, np.ndarray]]]) -> None:
        """Add the products of a few windows."""
        shared: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for layer in self._layers:
            parts = [rows[layer.name] for rows in windows if layer.name in rows]
            if not parts:
                continue
            inputs, gradient = (np.concatenate(rows) for rows in zip(*parts))
            outputs = self._outputs[layer.name]
            for number, block in enumerate(outputs):
                block += exact.gram(np.ascontiguousarray(gradient[:, number * len(block) : (number + 1) * len(block)]))
            weights = np.einsum("tn,tn->t", gradient, gradient, dtype=np.float64)
            mean = float(weights.mean()) or 1.0
            key = f"{layer.name.rpartition('.')[0]}|{layer.group}"
            earlier = shared.get(key)
            shared[key] = (inputs, weights / mean if earlier is None else earlier[1] + weights / mean)
        for key, (inputs, weights) in shared.items():
            self._inputs[key.split("|", 1)[1]].add(inputs * np.sqrt(weights)[:, None].astype(np.float32))

    def result(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The block's two sides, by group and by layer."""
        inputs = {group: total.mean() for group, total in self._inputs.items() if total.tokens}
        return inputs, {name: total / max(self._tokens, 1) for name, total in self._outputs.items()}


class _Watcher:
    """A hook that notes (name, input, output) of a module in the thread's own store."""

    def __init__(self, name: str, seen: threading.local) -> None:
        self._name, self._seen = name, seen

    def __call__(self, module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        self._seen.calls.append((self._name, arguments[0].detach(), output))


def _rows_of(
    calls: list[tuple[str, torch.Tensor, torch.Tensor]], gradients: Sequence[torch.Tensor | None]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Inputs and output gradients, float32 [tokens, K] and [tokens, N], by layer."""
    rows: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for (name, inputs, _), gradient in zip(calls, gradients):
        if gradient is not None and name not in rows:
            flat = inputs.reshape(-1, inputs.shape[-1]).numpy(), gradient.reshape(-1, gradient.shape[-1]).numpy()
            rows[name] = flat
    return rows
