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
from septet.calibration.sums import InputSum, block_grams
from septet.calibration.workers import Machine, at_work, map_windows
from septet.errors import CheckpointError
from septet.model import LayerPlan
from septet.quantize.statistics import output_rows

__all__ = ["Sensitivity", "load_array", "measure", "save_array"]

#: Squares on the diagonal of a symmetric matrix that are stored whole.
_SQUARE = 512
_AGAIN = "delete {} and run the same command with --resume"


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
        found = self._get(f"inputs of {group}")
        return found if found is None or self._folder is None else _unfolded(found, self._file(f"inputs of {group}"))

    def outputs(self, layer: str) -> np.ndarray | None:
        """float32 [blocks, B, B], mean of d transpose(d) per token, B as `quantize.statistics.output_rows` says."""
        return self._get(f"outputs of {layer}")

    def put(self, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        """Keep the two sides of some groups and layers, float32."""
        named = {f"inputs of {group}": matrix if self._folder is None else _folded(matrix) for group, matrix in inputs.items()}
        named |= {f"outputs of {layer}": matrix for layer, matrix in outputs.items()}
        for key, matrix in named.items():
            if self._folder is None:
                self._arrays[key] = matrix
            else:
                save_array(self._file(key), matrix)

    def _get(self, key: str) -> np.ndarray | None:
        if self._folder is None:
            return self._arrays.get(key)
        file = self._file(key)
        return load_array(file) if file.is_file() else None

    def _file(self, key: str) -> Path:
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"


def _folded(matrix: np.ndarray) -> np.ndarray:
    """A symmetric matrix, float32 [K, K], without what lies below the squares of its diagonal: K, then slabs of rows; float32 [n]."""
    size = len(matrix)
    slabs = [matrix[start : start + _SQUARE, start:].reshape(-1) for start in range(0, size, _SQUARE)]
    return np.concatenate([np.array([size], np.float32), *slabs])


def _unfolded(folded: np.ndarray, path: Path) -> np.ndarray:
    """The inverse of `_folded`.

    Raises:
        CheckpointError: the array is none that `_folded` made.
    """
    size = int(folded[0]) if folded.ndim == 1 and len(folded) and np.isfinite(folded[0]) else 0
    starts = range(0, size, _SQUARE)
    if size < 1 or len(folded) != 1 + sum((min(start + _SQUARE, size) - start) * (size - start) for start in starts):
        raise CheckpointError(f"{path.name} must hold a symmetric matrix", f"{folded.size} numbers", _AGAIN.format(path.parent))
    matrix, position = torch.empty((size, size)), 1
    for start in starts:
        stop = min(start + _SQUARE, size)
        slab = torch.from_numpy(folded[position : position + (stop - start) * (size - start)]).reshape(stop - start, -1)
        matrix[start:stop, start:] = slab
        matrix[stop:, start:stop] = slab[:, stop - start :].T
        position += slab.numel()
    return matrix.numpy()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array of any dtype and shape to an .npy file, which appears whole or not at all."""
    unfinished = path.with_suffix(".unfinished.npy")
    with open(unfinished, "wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_array(path: Path) -> np.ndarray:
    """Read what `save_array` wrote; a file that says more than it holds takes no memory.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    try:
        return np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path.name} must hold an array", error, _AGAIN.format(path.parent)) from error


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
    states = [chain.hidden]
    for index, block in enumerate(blocks):
        with at_work([block], machine):
            parts = map_windows(lambda hidden, i=index: chain.block_output(i, hidden).to("cpu"), states[-1], machine)
            states.append([moved for part in parts for moved in part])
    gradients = _head_gradients(chain, states.pop(), seed, machine)
    for index in reversed(range(len(blocks))):
        members = [layer for layer in layers if layer.name.startswith(f"{prefix}.{index}.")]
        step = _Step(model, chain, members, machine)
        with at_work([blocks[index]], machine):
            gradients = step.run(index, states.pop(), gradients)
        found.put(*step.result())
        progress(len(blocks) - index, len(blocks))
    return found


def _head_gradients(chain: Chain, hidden: list[torch.Tensor], seed: int, machine: Machine) -> list[torch.Tensor]:
    """The gradient of drawn labels' log loss, summed over tokens, behind the last block: like `hidden`."""

    def work(number: int) -> torch.Tensor:
        state = hidden[number].detach().to(machine.device).requires_grad_(True)
        scores = torch.log_softmax(chain.logits(chain.windows[number], state), -1)
        generator = torch.Generator(machine.device).manual_seed(seed * 1_000_003 + number)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        return torch.autograd.grad(-scores.gather(1, drawn).sum(), state)[0].to("cpu")

    with chain.recorders():
        return [gradient for part in map_windows(work, range(len(hidden)), machine, gradients=True) for gradient in part]


class _Step:
    """One block: sums over windows of what its layers see in both directions."""

    def __init__(self, model: nn.Module, chain: Chain, layers: Sequence[LayerPlan], machine: Machine) -> None:
        self._chain, self._layers, self._machine = chain, layers, machine
        self._modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
        self._inputs = {layer.group: InputSum(layer.shape[1], machine.device) for layer in layers}
        rows = {layer.name: output_rows(layer.shape[0]) for layer in layers}
        shapes = {layer.name: (layer.shape[0] // rows[layer.name], *2 * (rows[layer.name],)) for layer in layers}
        self._outputs = {name: torch.zeros(shape, dtype=torch.float64, device=machine.device) for name, shape in shapes.items()}
        self._tokens = 0

    def run(self, index: int, hidden: list[torch.Tensor], gradients: list[torch.Tensor]) -> list[torch.Tensor]:
        """Add up all windows behind block `index`; returns the gradients before it, in the host's memory."""
        seen = threading.local()
        hooks = [module.register_forward_hook(_Watcher(name, seen)) for name, module in self._modules.items()]

        def work(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
            seen.calls = []
            state, gradient = (tensor.detach().to(self._machine.device) for tensor in pair)
            state.requires_grad_(True)
            output = self._chain.block_output(index, state)
            wanted = [state, *(call[2] for call in seen.calls)]
            found = torch.autograd.grad(output, wanted, gradient, allow_unused=True)
            return found[0].to("cpu"), _rows_of(seen.calls, found[1:])

        moved: list[torch.Tensor] = []
        try:
            for results in map_windows(work, list(zip(hidden, gradients)), self._machine, gradients=True):
                moved += [gradient for gradient, _ in results]
                self._add([rows for _, rows in results])
        finally:
            for hook in hooks:
                hook.remove()
        self._tokens = sum(state.shape[:-1].numel() for state in hidden)
        return moved

    def _add(self, windows: list[dict[str, tuple[torch.Tensor, torch.Tensor]]]) -> None:
        """Add the products of a few windows."""
        shared: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer in self._layers:
            parts = [rows[layer.name] for rows in windows if layer.name in rows]
            if not parts:
                continue
            inputs, gradient = (torch.cat(rows) for rows in zip(*parts))
            outputs = self._outputs[layer.name]
            outputs += block_grams(gradient, len(outputs))
            weights = _square_sums(gradient)
            mean = float(weights.mean()) or 1.0
            key = f"{layer.name.rpartition('.')[0]}|{layer.group}"
            earlier = shared.get(key)
            shared[key] = (inputs, weights / mean if earlier is None else earlier[1] + weights / mean)
        for key, (inputs, weights) in shared.items():
            self._inputs[key.split("|", 1)[1]].add(inputs * weights.sqrt()[:, None].float())

    def result(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The block's two sides, by group and by layer."""
        inputs = {group: _float32(total.mean()) for group, total in self._inputs.items() if total.tokens}
        return inputs, {name: _float32(total / max(self._tokens, 1)) for name, total in self._outputs.items()}


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


def _float32(matrix: np.ndarray | torch.Tensor) -> np.ndarray:
    """A matrix from wherever it is, as it is kept."""
    return matrix.astype(np.float32) if isinstance(matrix, np.ndarray) else matrix.float().cpu().numpy()
