"""Applying a recipe to a model layer by layer behind the already quantized prefix, and judging what came out against the original.

All recipes get the same calibration windows and are judged on the same windows of another text, in float32 with float activations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from quality_recipes import Group, Recipe
from torch import nn

from septet import loading, model
from septet.calibration import Calibrator, Machine, Sensitivity, measure
from septet.checkpoint import QuantizeOptions
from septet.cli.calibration import SENSITIVITY_CONTEXT, write_windows
from septet.evaluation import Windows, cut_windows, score_models
from septet.model import LayerPlan

__all__ = ["RememberedReference", "calibration_windows", "judge", "quantize_model", "sensitivity_of", "written_windows"]


def calibration_windows(directory: Path, text: str, context: int, tokens: int) -> torch.Tensor:
    """Windows spread evenly over a text.

    Args:
        directory: whose tokenizer to use.
        text: at least two windows.
        context: tokens per window.
        tokens: about how many in all.

    Returns:
        int64 [windows, context].
    """
    windows = cut_windows(loading.load_tokenizer(directory), text, context, "all").tokens
    count = min(-(-tokens // context), len(windows))
    return windows[torch.arange(count) * len(windows) // count]


def written_windows(directory: Path, context: int, tokens: int) -> torch.Tensor:
    """What `septet quantize` calibrates on when no text is given: int64 [windows, context], seed 0."""
    return write_windows(loading.load_model(directory), (-(-tokens // context), context), 0, Machine(), lambda stage: None)


def sensitivity_of(directory: Path, windows: torch.Tensor) -> Sensitivity:
    """What errors of each layer matter for, as `septet quantize` measures it."""
    net = loading.load_model(directory)
    return measure(net, model.plan(net, QuantizeOptions(head="keep")), windows[:, :SENSITIVITY_CONTEXT].contiguous())


def quantize_model(
    directory: Path,
    recipe: Recipe,
    windows: torch.Tensor,
    progress: Callable[[int, int], None],
    sensitivity: Sensitivity | None = None,
) -> tuple[dict[str, torch.Tensor], float]:
    """Quantize the linear layers of a model; head, embedding and norms stay.

    Args:
        directory: the dense model.
        recipe: how.
        windows: int64 [windows, tokens], calibration text; not used by recipes without calibration.
        progress: called with (groups done, groups).
        sensitivity: of the layers, for recipes that want it.

    Returns:
        Dequantized weights by module name, float32 as the module has them; and stored bits per weight of these layers.
    """
    net = loading.load_model(directory)
    layers = model.plan(net, QuantizeOptions(head="keep"))
    calibrator = Calibrator(net, layers, windows, sensitivity=sensitivity) if recipe.calibrated else None
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    made: dict[str, torch.Tensor] = {}
    bits = count = 0.0
    for done, members in enumerate(groups.values(), 1):
        known = calibrator.statistics(members) if calibrator is not None else None
        hessian = None if known is None else known.inputs
        names, weights = [layer.name for layer in members], [_dense(net, layer) for layer in members]
        for layer, result in zip(members, recipe.quantize(Group(names, weights, hessian, known))):
            made[layer.name] = _stored(layer, result.weight)
            _put(net, layer.name, made[layer.name])
            bits, count = bits + result.bits_per_weight * result.weight.size, count + result.weight.size
        progress(done, len(groups))
    return made, bits / count


def judge(
    directory: Path, weights: dict[str, torch.Tensor], windows: Windows, reference: nn.Module, progress: Callable[[int, int], None]
) -> dict[str, float | None]:
    """Put weights into the dense model and compare it with the reference; the figures of `score_models`."""
    judged = loading.load_model(directory, torch.float32)
    for name, weight in weights.items():
        _put(judged, name, weight)
    return score_models(judged, windows, reference, progress)


class RememberedReference(nn.Module):
    """A model that keeps the input of its head for every window, so that a second judgement costs the head alone.

    Only where the head of what it kept gives the very logits of the model.
    """

    def __init__(self, reference: nn.Module) -> None:
        super().__init__()
        self.reference, self.config, self.head = reference, reference.config, reference.get_output_embeddings()
        self._kept: dict[bytes, torch.Tensor] = {}
        self._calls = threading.local()
        self.head.register_forward_pre_hook(self._note)

    def _note(self, head: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        self._calls.seen = arguments[0]

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        """The reference's output, of which only `logits` is sure to be there."""
        key = input_ids.numpy().tobytes() + bytes([0]) + str(logits_to_keep).encode()
        if key in self._kept:
            return SimpleNamespace(logits=self.head(self._kept[key]))
        output = self.reference(input_ids=input_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)
        seen = self._calls.seen.clone()
        if torch.equal(self.head(seen), output.logits):
            self._kept[key] = seen
        return output


def _dense(net: nn.Module, layer: LayerPlan) -> np.ndarray:
    """A layer's weight, float32 [N, K]."""
    weight = net.get_submodule(layer.name).weight.detach().float().numpy()
    return np.ascontiguousarray(weight.T) if layer.kind == "conv1d" else weight


def _stored(layer: LayerPlan, weight: np.ndarray) -> torch.Tensor:
    """The other way round: as the module has it."""
    values = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    return values.T.contiguous() if layer.kind == "conv1d" else values


def _put(net: nn.Module, name: str, weight: torch.Tensor) -> None:
    net.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
