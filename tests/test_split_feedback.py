"""Laws of error feedback in the split code: a Hessian that says nothing changes nothing, batches and threads neither, the loss falls."""

from __future__ import annotations

import numpy as np
import pytest

from septet.errors import OptionError, ShapeError
from septet.quantize import dequantize, quantize_split, quantize_split_with_feedback, ranges
from septet.quantize.split_feedback import encode_fields, plan_feedback

STYLES = [(symmetric, granularity) for symmetric in (False, True) for granularity in ("channel", "group", "tensor")]


def correlated_hessian(rng: np.random.Generator, inputs: int, tokens: int = 500) -> np.ndarray:
    """Of inputs that share a few directions, with strengths that differ by a factor of 50."""
    directions = rng.standard_normal((max(inputs // 4, 1), inputs))
    strength = np.exp(rng.uniform(-2, 2, inputs))
    activations = (rng.standard_normal((tokens, len(directions))) @ directions + 0.3 * rng.standard_normal((tokens, inputs))) * strength
    return activations.T @ activations / tokens


def gaussian(rng: np.random.Generator, outputs: int, inputs: int) -> np.ndarray:
    return (0.02 * rng.standard_normal((outputs, inputs))).astype(np.float32)


def proxy_loss(weight: np.ndarray, made: object, hessian: np.ndarray) -> float:
    """Mean squared error of the outputs, in the Hessian's own text."""
    errors = dequantize(made).astype(np.float64) - weight
    return float(np.einsum("nk,kj,nj->", errors, hessian, errors, optimize=True))


def same_bytes(first: object, second: object) -> bool:
    others = second.tensors()
    return first.tensors().keys() == others.keys() and all(a.tobytes() == others[name].tobytes() for name, a in first.tensors().items())


@pytest.mark.parametrize("symmetric, granularity", STYLES)
def test_a_hessian_that_says_nothing_is_plain_rounding(rng: np.random.Generator, symmetric: bool, granularity: str) -> None:
    weight = gaussian(rng, 70, 22)
    plain = quantize_split(weight, symmetric, granularity, 8)
    for hessian in (None, np.eye(22), 1e-9 * np.eye(22), np.zeros((22, 22)), np.full((22, 22), np.nan)):
        assert same_bytes(quantize_split_with_feedback(weight, hessian, symmetric, granularity, 8), plain)


def test_without_correlation_only_the_ranges_change(rng: np.random.Generator) -> None:
    weight, strength = gaussian(rng, 40, 32), np.exp(rng.uniform(-3, 3, 32))
    plan = plan_feedback(np.diag(strength))
    assert not plan.factor.coefficients.any() and plan.importance.max() == 1
    made = quantize_split_with_feedback(weight, np.diag(strength))
    plain = quantize_split(weight)
    assert proxy_loss(weight, made, np.diag(strength)) < 0.95 * proxy_loss(weight, plain, np.diag(strength))
    steps = made.scale.astype(np.float32)[:, np.arange(32) % 2]
    fields = np.rint((dequantize(made) - made.offset.astype(np.float32)[:, np.arange(32) % 2]) / steps)
    nearest = np.clip(
        np.rint((weight - made.offset.astype(np.float32)[:, np.arange(32) % 2]) / steps), 0, np.where(np.arange(32) % 2, 7, 15)
    )
    assert np.array_equal(fields, nearest)


@pytest.mark.parametrize("outputs, inputs", [(64, 64), (3, 37), (65, 18), (1, 1)])
def test_feedback_does_not_depend_on_batches_pieces_or_threads(
    rng: np.random.Generator, outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, plan = gaussian(rng, outputs, inputs), plan_feedback(correlated_hessian(rng, inputs))
    scale, lowest = np.full((1, inputs), 0.008, np.float32), np.full((1, inputs), -0.05, np.float32)
    whole = encode_fields(weight, scale, lowest, plan, batch_inputs=64)
    for batch in (4, 12, 32):
        assert np.array_equal(encode_fields(weight, scale, lowest, plan, batch_inputs=batch), whole)
    monkeypatch.setattr("septet.quantize.split_feedback._PIECE_WEIGHTS", 5 * inputs)
    assert np.array_equal(encode_fields(weight, scale, lowest, plan, threads=3), whole)
    assert np.array_equal(encode_fields(weight[:1], scale, lowest, plan), whole[:1])


@pytest.mark.parametrize("symmetric, granularity", STYLES)
def test_feedback_lowers_the_loss(rng: np.random.Generator, symmetric: bool, granularity: str) -> None:
    weight, hessian = gaussian(rng, 64, 64), correlated_hessian(rng, 64)
    plain = quantize_split(weight, symmetric, granularity, 16)
    made = quantize_split_with_feedback(weight, hessian, symmetric, granularity, 16)
    assert proxy_loss(weight, made, hessian) < 0.2 * proxy_loss(weight, plain, hessian)
    assert made.config().keys() == plain.config().keys() and made.size_bytes == plain.size_bytes
    assert made.relative_error < 3 * plain.relative_error


def test_every_input_is_rounded_at_its_target(rng: np.random.Generator) -> None:
    """Against the definition, with NumPy's own Cholesky factor."""
    weight, hessian = gaussian(rng, 32, 16), correlated_hessian(rng, 16)
    plan = plan_feedback(hessian)
    order = plan.order
    assert np.array_equal(np.sort(order), np.arange(16))
    damage = hessian.diagonal() * np.where(np.arange(16) % 2, 4, 1)
    assert (np.diff(damage[order]) >= 0).all()
    made = quantize_split_with_feedback(weight, hessian)
    cholesky = np.linalg.cholesky((hessian + 0.01 * hessian.trace() / 16 * np.eye(16))[np.ix_(order, order)])
    assert plan.importance[order] == pytest.approx(cholesky.diagonal() ** 2 / (cholesky.diagonal() ** 2).max(), rel=1e-4)
    blocks = np.kron(np.eye(4), np.ones((4, 4))) * cholesky
    lower = cholesky @ np.linalg.inv(blocks)
    scale, offset = (part.astype(np.float32)[:, order % 2] for part in (made.scale, made.offset))
    wanted, decoded = weight[:, order].astype(np.float64), dequantize(made)[:, order]
    errors = decoded - wanted
    for start in range(0, 16, 4):
        tile = slice(start, start + 4)
        target = wanted[:, tile] - errors[:, start + 4 :] @ lower[start + 4 :, tile]
        codes = np.clip(np.rint((target - offset[:, tile]) / scale[:, tile]), 0, np.where(order[tile] % 2, 7, 15))
        # Errors are counted in 2^-18 of the row's range, so a target on the edge between two codes may fall to either side.
        assert (np.abs(codes * scale[:, tile] + offset[:, tile] - decoded[:, tile]) < 1e-6).mean() > 0.98


def test_importance_makes_ranges_better_where_it_matters(rng: np.random.Generator) -> None:
    parts = gaussian(rng, 200, 5), gaussian(rng, 200, 5)
    importance = tuple(np.exp(rng.uniform(-6, 0, (200, 1))).astype(np.float32) for _ in parts)
    for symmetric in (False, True):
        tried = {name: ranges.fit_fields(parts, symmetric, name, "layer") for name in ("minmax", "mse")}
        tried["importance"] = ranges.fit_fields(parts, symmetric, "mse", "layer", importance)
        for field, (values, known) in enumerate(zip(parts, importance)):
            losses = {
                name: ranges.range_error(values, ranges.quantize_field(values, fit[field]), fit[field], known)
                for name, fit in tried.items()
            }
            assert (losses["importance"] <= losses["minmax"]).all()
            assert losses["importance"].sum() < 0.97 * losses["mse"].sum()


def test_damaged_inputs_do_no_harm(rng: np.random.Generator) -> None:
    weight, hessian = gaussian(rng, 16, 24), correlated_hessian(rng, 24)
    clean = hessian.copy()
    clean[[3, 10, 17]] = clean[:, [3, 10, 17]] = 0
    hessian[3] = hessian[:, 3] = np.nan
    hessian[10, 10], hessian[17, 17] = np.inf, -1
    assert same_bytes(quantize_split_with_feedback(weight, hessian), quantize_split_with_feedback(weight, clean))


def test_extreme_rows_stay_finite(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 8, 32)
    weight[0], weight[1], weight[2, 5] = 0, 0.01, 100.0
    weight[3] *= 1e-6
    made = dequantize(quantize_split_with_feedback(weight, correlated_hessian(rng, 32)))
    assert np.isfinite(made).all() and not made[0].any() and made[1] == pytest.approx(0.01, rel=1e-3)


def test_wrong_arguments_are_refused(rng: np.random.Generator) -> None:
    weight = gaussian(rng, 4, 8)
    with pytest.raises(ShapeError, match="Hessian of layer"):
        quantize_split_with_feedback(weight, np.eye(12), name="layer")
    with pytest.raises(OptionError, match="granularity"):
        quantize_split_with_feedback(weight, None, granularity="row")
    with pytest.raises(OptionError, match="multiple of 4"):
        quantize_split_with_feedback(weight, np.eye(8), granularity="group", group_size=6)
