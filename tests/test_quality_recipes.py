"""The recipes of benchmarks/quality.py do what their titles say, and the dithered model lies on no grid any more."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import dither_model
import quality_ggml
import quality_recipes

from needs import reason

INPUTS = 192
#: More than this is damage, not rounding: three bits without feedback lose a quarter of a Gaussian.
LARGEST_ERROR = 0.6


@pytest.fixture
def group(rng: np.random.Generator) -> quality_recipes.Group:
    """Two layers with the Hessian of inputs that share some directions."""
    rows = rng.standard_normal((600, 20)) @ rng.standard_normal((20, INPUTS)) + 0.5 * rng.standard_normal((600, INPUTS))
    weights = [(0.02 * rng.standard_normal((outputs, INPUTS))).astype(np.float32) for outputs in (128, 64)]
    return quality_recipes.Group(["block.q_proj", "block.k_proj"], weights, rows.T @ rows / 600)


def loss(group: quality_recipes.Group, made: list[quality_recipes.Quantized]) -> float:
    """Squared error of the outputs of the group."""
    errors = np.concatenate([one.weight - weight for one, weight in zip(made, group.weights)]).astype(np.float64)
    return float(np.einsum("nk,kj,nj->", errors, group.hessian, errors, optimize=True))


@pytest.mark.parametrize("name", quality_recipes.RECIPES)
def test_every_recipe_gives_weights_and_bits(name: str, group: quality_recipes.Group) -> None:
    recipe = quality_recipes.RECIPES[name]
    if recipe.family == "llama.cpp" and not quality_ggml.is_available():
        pytest.skip(reason("llama-cpp", "it builds for ten minutes, so make test leaves it out; the recipes of septet are tested without"))
    given = group if recipe.calibrated else quality_recipes.Group(group.names, group.weights, None)
    made = recipe.quantize(given)
    for one, weight in zip(made, group.weights, strict=True):
        assert one.weight.shape == weight.shape and one.weight.dtype == np.float32
        assert 0 < np.linalg.norm(one.weight - weight) / np.linalg.norm(weight) < LARGEST_ERROR
        assert 3 <= one.bits_per_weight < 9


def test_the_plot_knows_every_family() -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
    import quality_plot

    assert set(quality_recipes.FAMILIES) == set(quality_plot.FAMILIES)
    assert {recipe.family for recipe in quality_recipes.RECIPES.values()} == set(quality_recipes.FAMILIES)
    assert set(quality_recipes.MAIN) <= set(quality_recipes.RECIPES)


def test_what_knows_more_loses_less(group: quality_recipes.Group) -> None:
    recipes = quality_recipes.RECIPES
    losses = {
        name: loss(group, recipe.quantize(group)) for name, recipe in recipes.items() if recipe.family not in ("llama.cpp", "trellis")
    }
    for better, worse in (
        ("int8", "gptq-4"),
        ("gptq-4", "int4-group"),
        ("gptq-3", "int3-group"),
        ("gptq-4", "gptq-4-channel"),
        ("gptq-4", "gptq-3"),
        ("awq-4", "int4-group"),
        ("awq-3", "int3-group"),
        ("split-feedback", "split"),
        ("split-group-feedback", "split-feedback"),
        ("int4", "int3"),
    ):
        assert losses[better] < losses[worse], (better, worse)


def test_awq_pays_for_scales_that_nothing_can_take(group: quality_recipes.Group) -> None:
    alone = quality_recipes.Group(["block.o_proj"], group.weights[:1], group.hessian)
    paid, free = (quality_recipes.RECIPES["awq-4"].quantize(given)[0].bits_per_weight for given in (alone, group))
    assert paid - free == pytest.approx(16 / 128)


def test_dithering_leaves_no_grid(rng: np.random.Generator) -> None:
    steps = rng.uniform(0.01, 0.1, (512, 1))
    codes = rng.integers(0, 16, (512, 32))
    codes[:, 0], codes[:, 1] = 0, 15
    flat = ((codes - 7) * steps).astype(np.float32).reshape(64, 256)
    grid = torch.from_numpy(flat).to(torch.bfloat16)
    assert dither_model.lies_on_grid(grid)
    assert not dither_model.lies_on_grid(torch.from_numpy(rng.standard_normal((64, 256)).astype(np.float32)))
    assert not dither_model.lies_on_grid(torch.ones(64)) and not dither_model.lies_on_grid(torch.ones(4, 33))
    moved = dither_model.dither(grid, 1)
    assert moved.dtype == grid.dtype and not dither_model.lies_on_grid(moved)
    shift = (moved.float() - grid.float()).numpy().reshape(512, 32) / steps
    # bfloat16 rounds values of up to 8 steps to 1/32 of a step.
    assert np.abs(shift).max() < 0.55 and abs(shift.mean()) < 0.01 and shift.var() == pytest.approx(1 / 12, rel=0.05)
    assert torch.equal(moved, dither_model.dither(grid, 1)) and not torch.equal(moved, dither_model.dither(grid, 2))
