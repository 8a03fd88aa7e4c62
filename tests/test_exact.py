"""Products that do not depend on the order of addition: equal under every permutation, and close to the true ones."""

from __future__ import annotations

import numpy as np
import pytest

from septet.errors import ShapeError
from septet.quantize import exact
from septet.quantize.hessian import HessianSum, rotate_hessian


def spread(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of very different sizes."""
    return rng.standard_normal(shape) * np.exp(4 * rng.standard_normal(shape))


def sylvester(size: int, block: int) -> np.ndarray:
    """The block Hadamard matrix, float64 [size, size], from its definition."""
    index = np.arange(block)
    ones = np.array([bin(value).count("1") for value in (index[:, None] & index).ravel()]).reshape(block, block)
    return np.kron(np.eye(size // block), np.where(ones % 2, -1.0, 1.0) / np.sqrt(block))


@pytest.mark.parametrize("inner", [1, 3, 64, 300])
def test_product_is_the_same_in_any_order_and_close(rng: np.random.Generator, inner: int) -> None:
    left, right, order = spread(rng, 17, inner), spread(rng, inner, 9), rng.permutation(inner)
    here = exact.product(left, right)
    assert here.tobytes() == exact.product(left[:, order], right[order]).tobytes()
    assert here.tobytes() == np.concatenate([exact.product(left[:5], right), exact.product(left[5:], right)]).tobytes()
    bound = 2.0**-42 * inner * np.abs(left).max(axis=1)[:, None] * np.abs(right).max(axis=0)
    assert (np.abs(here - left @ right) <= bound).all()


def test_product_of_zeros_is_zero() -> None:
    assert not exact.product(np.zeros((3, 4)), np.ones((4, 2))).any()


def test_gram_is_the_same_in_any_order_and_close(rng: np.random.Generator) -> None:
    rows, order = rng.standard_normal((200, 12)).astype(np.float32), rng.permutation(200)
    rows[:, 3] = 0
    rows[7] *= 500
    here, true = exact.gram(rows), rows.T.astype(np.float64) @ rows
    assert here.tobytes() == exact.gram(rows[order]).tobytes()
    assert np.array_equal(here, here.T)
    largest = np.abs(rows).max(axis=0)
    assert (np.abs(here - true) <= 200 * 2.0**-20 * largest[:, None] * largest).all()


def test_hessian_is_the_mean_over_finite_tokens(rng: np.random.Generator) -> None:
    tokens = rng.standard_normal((50, 6)).astype(np.float32)
    total = HessianSum(6)
    assert not total.mean().any()
    total.add(tokens[:20])
    damaged = tokens[20:].copy()
    damaged[3, 2], damaged[9, 0] = np.nan, np.inf
    total.add(damaged)
    kept = np.delete(tokens, [23, 29], axis=0).astype(np.float64)
    assert total.tokens == 48
    np.testing.assert_allclose(total.mean(), kept.T @ kept / 48, rtol=1e-4, atol=1e-5)
    with pytest.raises(ShapeError, match=r"\[tokens, 6\]"):
        total.add(tokens[:, :5])


@pytest.mark.parametrize("block", [1, 4, 8])
def test_rotated_hessian_is_that_of_the_rotated_inputs(rng: np.random.Generator, block: int) -> None:
    tokens, scale = rng.standard_normal((30, 24)), rng.standard_normal(24).astype(np.float32)
    rotated = (tokens * scale) @ sylvester(24, block)
    np.testing.assert_allclose(rotate_hessian(tokens.T @ tokens, scale, block), rotated.T @ rotated, atol=1e-12 * 30)
