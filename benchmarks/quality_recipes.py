"""What `quality.py` can do to a model's linear layers: a name, a title, and a function from a fused group to dequantized weights.

Groups of 128 inputs where 128 divides, else 64, else 32 (SmolLM2 has layers of 576 and of 1536 inputs). AWQ's scales are folded into
what comes before, except in front of `o_proj`, where grouped-query attention leaves nothing that could take them.
llama.cpp's types: see `quality_ggml`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from quality_ggml import TYPES, quantize_ggml

from septet.quantize import (
    GroupStatistics,
    QuantizedTensor,
    dequantize,
    quantize_split,
    quantize_split_with_feedback,
    quantize_trellis,
)
from septet.quantize.awq import quantize_awq
from septet.quantize.baselines import quantize_baseline
from septet.quantize.gptq import quantize_gptq
from septet.quantize.grids import GridStyle

__all__ = ["FAMILIES", "LADDER", "MAIN", "RECIPES", "Group", "Quantized", "Recipe"]

#: What a plot has a colour for.
FAMILIES = ("rtn", "gptq", "awq", "llama.cpp", "split", "trellis")


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that read the same inputs.

    Args:
        names: of the modules.
        weights: float32 [N_i, K] each.
        hessian: float64 [K, K], mean of x transpose(x); None for recipes without calibration.
        statistics: all that calibration found out, for recipes that want sensitivities.
    """

    names: list[str]
    weights: list[np.ndarray]
    hessian: np.ndarray | None
    statistics: GroupStatistics | None = None

    @property
    def group_size(self) -> int | None:
        """Inputs that share a scale where a recipe has groups."""
        return next((size for size in (128, 64, 32) if self.weights[0].shape[1] % size == 0), None)


@dataclass(frozen=True, eq=False)
class Quantized:
    """One layer after a recipe: float32 [N, K], dequantized; and its bits per weight with all metadata."""

    weight: np.ndarray
    bits_per_weight: float


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model.

    Args:
        title: for a table.
        family: one of `FAMILIES`.
        quantize: a group to one result per layer.
        calibrated: whether it needs Hessians.
        sensitive: whether it needs to know what errors matter for, too.
        own_text: calibrated on what the model writes, not on the calibration text.
    """

    title: str
    family: str
    quantize: Callable[[Group], list[Quantized]]
    calibrated: bool
    sensitive: bool = False
    own_text: bool = False


def _rtn(bits: int, symmetric: bool, grouped: bool, group: Group) -> list[Quantized]:
    made = [quantize_baseline(weight, bits, symmetric, group.group_size if grouped else None) for weight in group.weights]
    return [Quantized(one.weight, one.bits_per_weight) for one in made]


def _gptq(bits: int, symmetric: bool, grouped: bool, search: bool, order: bool, group: Group) -> list[Quantized]:
    style = GridStyle(bits, symmetric, group.group_size if grouped else None, search)
    made = [quantize_gptq(weight, group.hessian, style, order) for weight in group.weights]
    return [Quantized(one.weight, one.bits_per_weight) for one in made]


def _awq(bits: int, symmetric: bool, group: Group) -> list[Quantized]:
    folded = not group.names[0].endswith("o_proj")
    made = quantize_awq(group.weights, group.hessian, GridStyle(bits, symmetric, group.group_size, search=True), folded)
    return [Quantized(one.weight, one.bits_per_weight) for one in made]


def _split(granularity: str, feedback: bool, group: Group) -> list[Quantized]:
    style = {"granularity": granularity, "group_size": group.group_size or 128}
    if not feedback:
        return _unpacked([quantize_split(weight, **style) for weight in group.weights])
    return _unpacked([quantize_split_with_feedback(weight, group.hessian, **style) for weight in group.weights])


def _trellis(bits_per_pair: int, group: Group) -> list[Quantized]:
    known = None if group.hessian is None else GroupStatistics(group.hessian)
    return _unpacked(quantize_trellis(group.weights, group.names, bits_per_pair, statistics=known))


def _step(drift: bool, outputs: bool, group: Group) -> list[Quantized]:
    """The recipe of `septet quantize`, as far as a step of the ladder goes."""
    known = group.statistics or GroupStatistics(group.hessian)
    known = GroupStatistics(known.inputs, known.drift if drift else None, known.outputs if outputs else None)
    return _unpacked(quantize_trellis(group.weights, group.names, 7, statistics=known))


def _unpacked(made: list[QuantizedTensor]) -> list[Quantized]:
    return [Quantized(dequantize(one), one.effective_bits) for one in made]


def _ggml(name: str, with_importance: bool, group: Group) -> list[Quantized]:
    importance = group.hessian.diagonal() if with_importance else None
    return [Quantized(*quantize_ggml(weight, name, importance)) for weight in group.weights]


def _rtn_recipes() -> dict[str, Recipe]:
    recipes = {}
    for bits in (8, 4, 3):
        kind = "symmetric" if bits == 8 else "asymmetric"
        recipes[f"int{bits}"] = Recipe(f"INT{bits}, per channel, {kind}", "rtn", partial(_rtn, bits, bits == 8, False), False)
    for bits in (4, 3):
        recipes[f"int{bits}-group"] = Recipe(f"INT{bits}, groups, asymmetric", "rtn", partial(_rtn, bits, False, True), False)
    return recipes


def _gptq_recipes() -> dict[str, Recipe]:
    recipes = {}
    for bits in (4, 3):
        # Symmetric, groups, search of ranges, activation order.
        variants = {
            "": ("groups, asymmetric", False, True, False, True),
            "-search": ("groups, asymmetric, ranges searched", False, True, True, True),
            "-symmetric": ("groups, symmetric", True, True, False, True),
            "-channel": ("per channel, asymmetric", False, False, False, True),
            "-file-order": ("groups, asymmetric, file order", False, True, False, False),
        }
        for suffix, (title, *how) in variants.items():
            recipes[f"gptq-{bits}{suffix}"] = Recipe(f"GPTQ, {bits} bits, {title}", "gptq", partial(_gptq, bits, *how), True)
    return recipes


def _awq_recipes() -> dict[str, Recipe]:
    title = {False: "asymmetric", True: "symmetric"}
    return {
        f"awq-{bits}{'-symmetric' * symmetric}": Recipe(
            f"AWQ, {bits} bits, groups, {title[symmetric]}", "awq", partial(_awq, bits, symmetric), True
        )
        for bits in (4, 3)
        for symmetric in (False, True)
    }


def _ggml_recipes() -> dict[str, Recipe]:
    return {
        f"ggml-{name.lower()}{'-im' * importance}": Recipe(
            f"llama.cpp {name}{', importance matrix' * importance}", "llama.cpp", partial(_ggml, name, importance), importance
        )
        for name, variants in TYPES.items()
        for importance in variants
    }


def _own_recipes() -> dict[str, Recipe]:
    recipes = {}
    for granularity, suffix, title in (("channel", "", "per channel"), ("group", "-group", "groups")):
        recipes[f"split{suffix}"] = Recipe(f"split (4 + 3 bits), {title}", "split", partial(_split, granularity, False), False)
        fed = Recipe(f"split (4 + 3 bits), {title}, error feedback", "split", partial(_split, granularity, True), True)
        recipes[f"split{suffix}-feedback"] = fed
    for bits_per_pair in (6, 7, 8):
        title = f"trellis, {bits_per_pair / 2:.1f} bits"
        name = f"trellis-{bits_per_pair / 2:.1f}"
        recipes[name] = Recipe(title, "trellis", partial(_trellis, bits_per_pair), False)
        recipes[f"{name}-feedback"] = Recipe(f"{title}, error feedback", "trellis", partial(_trellis, bits_per_pair), True)
    return recipes


def _ladder_recipes() -> dict[str, Recipe]:
    """Steps between plain rounding and the default effort, each with those before, all on text that the model writes."""
    steps = {
        "feedback": ("error feedback, one side", False, False, False),
        "weighed": ("+ inputs weighed by what depends on them", True, False, False),
        "drift": ("+ moved inputs made up for", True, True, False),
        "outputs": ("+ feedback and scales after the outputs' sensitivities", True, True, True),
    }
    return {
        f"step-{name}": Recipe(title, "trellis", partial(_step, drift, outputs), True, sensitive, True)
        for name, (title, sensitive, drift, outputs) in steps.items()
    }


#: Every recipe by its name.
RECIPES = _rtn_recipes() | _gptq_recipes() | _awq_recipes() | _ggml_recipes() | _own_recipes() | _ladder_recipes()
#: Steps on the way from plain rounding to the default effort, in their order.
LADDER = tuple(_ladder_recipes())
#: One of each kind; the others are variants of these.
MAIN = (
    *("int8", "int4", "int3", "int4-group", "int3-group", "gptq-4", "gptq-3-search", "awq-4", "awq-3"),
    *("split", "split-feedback", "split-group", "split-group-feedback"),
)
