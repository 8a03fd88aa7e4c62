"""The reference encoder: optimal and with decided ties against brute force, tail-biting, deterministic, close to Gaussian weights."""

from __future__ import annotations

import numpy as np
import pytest

from septet.codes import trellis, trellis_search
from septet.errors import CodeRangeError, ShapeError

WIDTHS = (6, 7, 8)
#: Mean squared error on a unit Gaussian that each width must stay below; 0.0078 is the bound at 3.5 bits.
ERROR_BARS = {6: 0.0183, 7: 0.0092, 8: 0.0050}


def all_paths(pairs: np.ndarray, levels: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Every path through pairs [steps, 2] with levels [windows, 2]: its stream, lowest bits first, and 16 times its squared error."""
    length = (len(levels).bit_length() - 1 - bits) + bits * len(pairs)
    streams = np.arange(1 << length, dtype=np.int64)
    cost = np.zeros(len(streams), np.int64)
    for step, pair in enumerate(pairs.astype(np.int64)):
        chosen = levels[streams >> bits * step & (len(levels) - 1)].astype(np.int64)
        cost += ((pair - 4 * chosen) ** 2).sum(axis=1)
    return streams, cost


def brute_force(pairs: np.ndarray, levels: np.ndarray, bits: int, state: int | None) -> np.ndarray:
    """All symbols of the best path by trying every one, ties to the lowest last state, then the lowest last symbol, and so on.

    With `state` the path starts and ends there. Returns the start state, then the symbols.
    """
    states, steps = len(levels) >> bits, len(pairs)
    streams, cost = all_paths(pairs, levels, bits)
    if state is not None:
        around = (streams & (states - 1) == state) & (streams >> bits * steps == state)
        streams, cost = streams[around], cost[around]
    # A stream's highest bits are its last state and before it the last symbols: the smallest number wins a tie.
    best = streams[cost == cost.min()].min()
    return np.array([best & (states - 1)] + [best >> bits * step & ((1 << bits) - 1) for step in range(steps)])


@pytest.mark.parametrize(("window_bits", "bits", "pairs"), [(4, 2, 3), (3, 1, 6), (5, 2, 3), (6, 2, 3), (6, 3, 2)])
@pytest.mark.parametrize("largest", [127, 2])
def test_both_passes_equal_brute_force(window_bits: int, bits: int, pairs: int, largest: int, rng: np.random.Generator) -> None:
    """Levels of at most 2 make many paths equally good, so the rule for ties decides."""
    for _ in range(10):
        levels = rng.integers(-largest, largest + 1, (1 << window_bits, 2)).astype(np.int8)
        fixed = rng.integers(-8 * largest, 8 * largest + 1, (3, 2 * pairs)).clip(-1020, 1020)
        symbols = trellis_search.search(fixed, levels, bits)
        for got, tile in zip(symbols, fixed.reshape(3, pairs, 2)):
            around = brute_force(np.concatenate([tile, tile]), levels, bits, None)
            middle = sum(int(symbol) << bits * step for step, symbol in enumerate(around[1 + pairs :]))
            state = middle & ((1 << window_bits - bits) - 1)
            np.testing.assert_array_equal(got, brute_force(tile, levels, bits, state)[1:])


@pytest.mark.parametrize(("window_bits", "bits", "pairs"), [(4, 2, 4), (3, 1, 6), (5, 2, 4), (6, 3, 2)])
@pytest.mark.parametrize("largest", [127, 2])
def test_searches_that_meet_are_as_good(window_bits: int, bits: int, pairs: int, largest: int, rng: np.random.Generator) -> None:
    """Which of several equally good ones is found may differ, so costs are compared: around the boundary, and of the tile."""
    mask = (1 << window_bits - bits) - 1
    for _ in range(10):
        levels = rng.integers(-largest, largest + 1, (1 << window_bits, 2)).astype(np.int8)
        fixed = rng.integers(-8 * largest, 8 * largest + 1, (3, 2 * pairs)).clip(-1020, 1020)
        for symbols, tile in zip(trellis_search.search_from_both_ends(fixed, levels, bits), fixed.reshape(3, pairs, 2)):
            stream = sum(int(symbol) << bits * step for step, symbol in enumerate(np.tile(symbols, 4)))
            stream &= (1 << bits * pairs + window_bits - bits) - 1
            streams, cost = all_paths(np.concatenate([tile, tile]), levels, bits)
            assert cost[streams >> bits * pairs & mask == stream & mask].min() == cost.min()
            streams, cost = all_paths(tile, levels, bits)
            assert cost[stream] == cost[(streams & mask == stream & mask) & (streams >> bits * pairs == stream & mask)].min()


def total_cost(symbols: np.ndarray, fixed: np.ndarray, bits: int) -> np.ndarray:
    """16 times the squared error, [...]: exact."""
    return ((fixed.astype(np.int64) - 4 * trellis.decode(symbols, bits).astype(np.int64)) ** 2).sum(axis=-1)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("weights", ["Gaussian", "extreme"])
def test_no_single_symbol_can_be_improved(bits: int, weights: str, rng: np.random.Generator) -> None:
    """Symbols 3 to 127 leave the boundary state alone, so the second pass is optimal over each of them."""
    fixed = trellis.to_fixed(rng.standard_normal((1, 256)).astype(np.float32), bits)
    if weights == "extreme":
        fixed = (rng.integers(900, 1021, (1, 256)) * rng.choice([-1, 1], (1, 256))).astype(np.int16)
    symbols = trellis.encode(fixed, bits)
    best = total_cost(symbols, fixed, bits)[0]
    for pair in range(3, 128):
        others = np.repeat(symbols, 1 << bits, axis=0)
        others[:, pair] = np.arange(1 << bits)
        assert total_cost(others, fixed, bits).min() == best


@pytest.mark.parametrize("bits", WIDTHS)
def test_error_on_gaussian_weights(bits: int, rng: np.random.Generator) -> None:
    weights = rng.standard_normal((96, 256)).astype(np.float32)
    symbols = trellis.encode(trellis.to_fixed(weights, bits), bits)
    assert symbols.dtype == np.uint8 and symbols.max() < 1 << bits
    decoded = trellis.decode(symbols, bits) / trellis.WIDTHS[bits].levels_per_sigma
    assert ((decoded - weights) ** 2).mean() < ERROR_BARS[bits]


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_decoded_tile_encodes_without_error(bits: int, rng: np.random.Generator) -> None:
    """Only the true stream has cost 0, if the boundary pass finds its state."""
    symbols = rng.integers(0, 1 << bits, (4, 128)).astype(np.uint8)
    fixed = 4 * trellis.decode(symbols, bits).astype(np.int16)
    again = trellis.encode(fixed, bits)
    assert not total_cost(again, fixed, bits).any()


@pytest.mark.parametrize("bits", WIDTHS)
def test_tiles_do_not_depend_on_their_neighbours(bits: int, rng: np.random.Generator) -> None:
    fixed = rng.integers(-1020, 1021, (11, 256)).astype(np.int16)
    symbols = trellis.encode(fixed, bits)
    order = rng.permutation(11)
    np.testing.assert_array_equal(trellis.encode(fixed[order], bits), symbols[order])
    np.testing.assert_array_equal(trellis.encode(fixed[4:5], bits), symbols[4:5])


def test_costs_stay_exact_at_the_limits() -> None:
    """Every partial sum of the search must be an integer that float32 can hold."""
    largest_metric = 2 * 2 * 127**2 + 2 * trellis.FIXED_LIMIT * 127
    # Two steps reach every state, so costs spread by at most twice the range of the metric; the forbidden start comes on top.
    assert trellis_search.FORBIDDEN_COST + 4 * largest_metric < 2**24
    assert trellis_search.FORBIDDEN_COST > 4 * largest_metric
    # The smallest cost is 0 after every step, so nothing accumulates.
    pairs = np.full((1, 20, 2), trellis.FIXED_LIMIT)
    metric_rows = trellis_search._metric_rows(trellis.window_levels(7))
    cost = trellis_search._forward(pairs, metric_rows, 7, np.zeros((1, 512), np.float32))[1]
    assert cost.min() == 0 and cost.max() < 4 * largest_metric
    for value in (1020, -1020):
        fixed = np.full((1, 256), value, np.int16)
        assert np.abs(trellis.decode(trellis.encode(fixed, 8), 8)).mean() > 90


def test_encoder_takes_no_tiles() -> None:
    assert trellis.encode(np.zeros((0, 256), np.int16), 7).shape == (0, 128)


def test_encoder_rejects_bad_input() -> None:
    with pytest.raises(CodeRangeError, match="1021"):
        trellis.encode(np.full((1, 256), -1021, np.int16), 7)
    with pytest.raises(ShapeError, match="whole tiles"):
        trellis.encode(np.zeros((1, 255), np.int16), 7)


def test_search_with_given_levels_is_the_encoder(rng):
    """The native search takes any levels; with those of the code it is the encoder."""
    from septet import _native as native

    fixed = rng.integers(-300, 301, (5, 256)).astype(np.int16)
    for bits in (6, 7, 8):
        levels = trellis.window_levels(bits)
        assert (native.trellis_search(levels, fixed, bits) == native.trellis_encode(fixed, bits)).all()
    flipped = np.ascontiguousarray(-levels)
    assert (native.trellis_search(flipped, fixed, 8) == native.trellis_encode(-fixed, 8)).all()
    with pytest.raises(CodeRangeError):
        native.trellis_search(np.full((65536, 2), -128, np.int8), fixed, 7)
