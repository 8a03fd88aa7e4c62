"""Rounding activations to int8: the rule step by step, and its edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from septet.errors import ShapeError
from septet.kernels import reference

finite = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=100, deadline=None)
@given(x=arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 20)), elements=finite), segment=st.integers(1, 24))
def test_rule_step_by_step(x: np.ndarray, segment: int) -> None:
    q, scale = reference.quantize_activations(x, segment)
    assert q.dtype == np.int8 and scale.dtype == np.float32 and q.flags.c_contiguous
    assert q.shape == x.shape and scale.shape == (len(x), -(-x.shape[1] // segment))
    with np.errstate(over="ignore"):
        for m in range(len(x)):
            for s in range(scale.shape[1]):
                part = slice(s * segment, (s + 1) * segment)
                absmax = np.abs(x[m, part]).max()
                assert scale[m, s] == absmax / np.float32(127)
                for value, rounded in zip(x[m, part], q[m, part]):
                    expected = 0 if value == 0 else min(max(np.rint(value * (np.float32(127) / absmax)), -127), 127)
                    assert rounded == expected


@settings(max_examples=100, deadline=None)
@given(arrays(np.float32, (1, 16), elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)))
def test_largest_is_127_and_the_error_half_a_step(x: np.ndarray) -> None:
    q, scale = reference.quantize_activations(x, 16)
    if np.abs(x).max() < 1e-30:
        return
    assert np.abs(q).max() == 127
    error = np.abs(q * scale.astype(np.float64) - x)
    assert (error <= scale / 2 * (1 + 1e-4)).all()


def test_ties_round_to_even() -> None:
    q, _ = reference.quantize_activations(np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32), 6)
    np.testing.assert_array_equal(q, [[127, 0, 2, 2, 0, -2]])


def test_zeros_have_scale_zero() -> None:
    q, scale = reference.quantize_activations(np.array([[0, -0.0, 0, 4]], np.float32), 2)
    np.testing.assert_array_equal(q, [[0, 0, 0, 127]])
    np.testing.assert_array_equal(scale, np.array([[0, 4 / 127]], np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_segment_that_is_not_finite_has_scale_nan(bad: float) -> None:
    with np.errstate(invalid="raise"):  # no NaN may reach the conversion to int8
        q, scale = reference.quantize_activations(np.array([[1, bad, 3, 4]], np.float32), 2)
    np.testing.assert_array_equal(q, [[0, 0, 95, 127]])
    assert np.isnan(scale[0, 0]) and scale[0, 1] == np.float32(4 / 127)


def test_where_the_factor_is_infinite() -> None:
    """127 / 1e-40 overflows: all but zeros become the largest integer, and the product stays as small as it was."""
    with np.errstate(invalid="raise"):
        q, scale = reference.quantize_activations(np.array([[1e-40, 0, -1e-42]], np.float32), 3)
    np.testing.assert_array_equal(q, [[127, 0, -127]])
    assert 0 <= scale[0, 0] < 1e-41


def test_segments_must_have_inputs() -> None:
    with pytest.raises(ShapeError, match="at least one input"):
        reference.quantize_activations(np.ones((1, 4), np.float32), 0)
