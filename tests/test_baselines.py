"""The yardsticks GPTQ and AWQ: equal to their definitions on small layers, honest about bits, never worse than what they start from."""

from __future__ import annotations

import numpy as np
import pytest

from septet.errors import OptionError
from septet.quantize.awq import quantize_awq
from septet.quantize.gptq import quantize_gptq
from septet.quantize.grids import GridStyle, fit_grid, round_to_grid, search_grid, units_of


def correlated_hessian(rng: np.random.Generator, inputs: int) -> np.ndarray:
    rows = rng.standard_normal((400, 6)) @ rng.standard_normal((6, inputs)) + 0.3 * rng.standard_normal((400, inputs))
    rows *= np.exp(rng.uniform(-1.5, 1.5, inputs))
    return rows.T @ rows / 400


def gaussian(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    return (0.02 * rng.standard_normal((outputs, inputs))).astype(np.float32)


def plain(weight: np.ndarray, style: GridStyle) -> np.ndarray:
    units = units_of(weight, style.width(weight.shape[1]))
    return round_to_grid(units, fit_grid(units, style)).reshape(weight.shape)


def loss(weight: np.ndarray, rounded: np.ndarray, hessian: np.ndarray) -> float:
    errors = rounded.astype(np.float64) - weight
    return float(np.einsum("nk,kj,nj->", errors, hessian, errors))


def test_bits_count_scales_and_zero_points() -> None:
    assert GridStyle(4, False, 128).bits_per_weight(1536) == 4 + 20 / 128
    assert GridStyle(3, False, 64).bits_per_weight(576) == 3 + 19 / 64
    assert GridStyle(4, True, 128).bits_per_weight(1536) == 4.125
    assert GridStyle(4).bits_per_weight(576) == 4 + 20 / 576
    weight = np.ones((8, 16), np.float32)
    assert quantize_awq([weight], None, GridStyle(4, False, 8), folded=False)[0].bits_per_weight == 4 + 20 / 8 + 16 / 8
    assert quantize_awq([weight], None, GridStyle(4, False, 8))[0].bits_per_weight == 6.5


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_grids_reach_both_ends_and_hold_zero(rng: np.random.Generator, bits: int, symmetric: bool) -> None:
    units = gaussian(rng, 50, 32)
    units[0], units[1] = 0, np.abs(units[1])
    grid = fit_grid(units, GridStyle(bits, symmetric))
    rounded = round_to_grid(units, grid)
    step = grid.scale[:, None]
    # The upper end of a symmetric grid is a step short, a whole zero point moves an asymmetric one by half a step.
    assert (np.abs(rounded - units) <= (1.01 if symmetric else 0.76) * step).all()
    assert not round_to_grid(np.zeros_like(units), grid).any() and not rounded[0].any()
    codes = rounded[2:] / step[2:] + grid.zero[2:, None]
    assert codes == pytest.approx(np.rint(codes), abs=1e-3) and codes.min() > -0.5 and codes.max() < 2**bits - 0.5


@pytest.mark.parametrize("activation_order", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_gptq_without_correlation_is_plain_rounding(rng: np.random.Generator, activation_order: bool, group_size: int | None) -> None:
    weight, style = gaussian(rng, 16, 24), GridStyle(3, False, group_size)
    for hessian in (None, np.eye(24), np.diag(np.arange(1.0, 25)), np.zeros((24, 24))):
        assert np.array_equal(quantize_gptq(weight, hessian, style, activation_order).weight, plain(weight, style))


@pytest.mark.parametrize("activation_order", [True, False])
def test_gptq_is_optimal_brain_quantization_in_its_order(rng: np.random.Generator, activation_order: bool) -> None:
    """Against the greedy solver it speeds up: fix an input, solve for the best values of all others that are left."""
    weight, hessian, style = gaussian(rng, 6, 12), correlated_hessian(rng, 12), GridStyle(3)
    damped = hessian + 0.01 * hessian.trace() / 12 * np.eye(12)
    order = np.argsort(-hessian.diagonal()) if activation_order else np.arange(12)
    expected, grid = weight.astype(np.float64), fit_grid(weight, style)
    for position, column in enumerate(order):
        before = expected[:, column].copy()
        expected[:, column] = round_to_grid(expected[:, column, None], grid)[:, 0]
        left = order[position + 1 :]
        if len(left):
            change = np.linalg.solve(damped[np.ix_(left, left)], damped[left, column])
            expected[:, left] -= np.outer(expected[:, column] - before, change)
    assert quantize_gptq(weight, hessian, style, activation_order).weight == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("style", [GridStyle(3), GridStyle(3, True, 32), GridStyle(4, False, 32, True), GridStyle(4, True, None, True)])
def test_gptq_lowers_the_loss(rng: np.random.Generator, style: GridStyle) -> None:
    weight, hessian = gaussian(rng, 32, 160), correlated_hessian(rng, 160)
    losses = [loss(weight, quantize_gptq(weight, hessian, style, order).weight, hessian) for order in (True, False)]
    assert max(losses) < 0.4 * loss(weight, plain(weight, style), hessian)


def test_gptq_does_not_depend_on_its_batches(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = gaussian(rng, 8, 40), correlated_hessian(rng, 40)
    whole = quantize_gptq(weight, hessian, GridStyle(3, False, 8)).weight
    monkeypatch.setattr("septet.quantize.gptq._BATCH", 7)
    assert quantize_gptq(weight, hessian, GridStyle(3, False, 8)).weight == pytest.approx(whole, abs=1e-6)


def test_search_never_raises_its_loss(rng: np.random.Generator) -> None:
    weight, hessian = gaussian(rng, 20, 24), correlated_hessian(rng, 24)
    blocks = hessian * np.kron(np.eye(3), np.ones((8, 8)))
    for symmetric in (False, True):
        searched = round_to_grid(units_of(weight, 8), search_grid(weight, GridStyle(3, symmetric, 8, True), hessian)).reshape(20, 24)
        assert loss(weight, searched, blocks) < loss(weight, plain(weight, GridStyle(3, symmetric, 8)), blocks)


def test_awq_saves_the_inputs_that_matter(rng: np.random.Generator) -> None:
    weights, hessian = [gaussian(rng, 32, 64), gaussian(rng, 16, 64)], correlated_hessian(rng, 64)
    hessian[5] *= 30
    hessian[:, 5] *= 30
    for style, at_most in ((GridStyle(3, False, 16), 0.6), (GridStyle(3, False, 16, True), 0.6), (GridStyle(4, True), 0.6)):
        made = quantize_awq(weights, hessian, style)
        after, before = (
            sum(loss(weight, rounded, hessian) for weight, rounded in zip(weights, all_rounded))
            for all_rounded in ([one.weight for one in made], [plain(weight, style) for weight in weights])
        )
        assert after < at_most * before
    nothing_known = quantize_awq(weights, None, GridStyle(4, False, 16))
    assert np.array_equal(nothing_known[0].weight, plain(weights[0], GridStyle(4, False, 16)))


def test_inputs_without_activations_stay_finite(rng: np.random.Generator) -> None:
    weight, hessian = gaussian(rng, 8, 16), correlated_hessian(rng, 16)
    hessian[3] = hessian[:, 3] = 0
    assert np.isfinite(quantize_awq([weight], hessian, GridStyle(4, False, 8))[0].weight).all()
    assert np.isfinite(quantize_gptq(weight, hessian, GridStyle(4, False, 8)).weight).all()


def test_impossible_grids_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(OptionError, match="2..8 bits"):
        GridStyle(9)
    with pytest.raises(OptionError, match="must divide"):
        quantize_gptq(gaussian(rng, 4, 12), None, GridStyle(4, False, 8))
