"""The encoder of the trellis code: an exact Viterbi search in integers, with all ties decided.

Inputs X are quarter levels. The cost of giving a pair (X0, X1) the window w with levels (T0, T1) is
m(w) = 2*(T0^2 + T1^2) - (X0*T0 + X1*T1): twice the squared error in levels, less a constant of the pair.
The state after pair p is s = w[p] >> b, the 16 - b bits that the next window starts with. One step:

    cost'[s] = min over low = 0..2^b - 1 of cost[w & (2^(16-b) - 1)] + m(w),   w = s << b | low;   ties: lowest low
    then the smallest cost' is subtracted from all, which changes no decision

1. Boundary. Run over pairs 96..127, 0..31 with all start states at cost 0. From the cheapest last state (ties: lowest
   state) trace back to the state after pair 127.
2. Tile. Run over pairs 0..127; that state starts at cost 0, all others at 2^22. Trace back from that same state.
   The symbol of pair p is w[p] & (2^b - 1).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["BOUNDARY_STEPS", "FORBIDDEN_COST", "reversed_windows", "search", "search_from_both_ends"]

#: Pairs on each side of the tile's boundary that the first pass looks at.
BOUNDARY_STEPS = 32
#: Start cost of the states the second pass must not start in; a path from the right state is always cheaper.
FORBIDDEN_COST = 1 << 22
# 8 tiles keep the metric of one step, 8 x 65536 floats, inside a level 2 cache of 2 MB.
_TILES_AT_ONCE = 8


def search(fixed: np.ndarray, levels: np.ndarray, bits: int) -> np.ndarray:
    """Encode tiles.

    Args:
        fixed: integers [tiles, 2 * pairs] in stream order, quarter levels, -1020..1020.
        levels: int8 [65536, 2], the levels of each window; shorter windows work as well, and tests use them.
        bits: bits per pair, at least a third of a window, so that two steps lead from any state to any other.

    Returns:
        uint8 [tiles, pairs], below 2^bits.
    """
    metric_rows = _metric_rows(levels)

    def encode(chunk: np.ndarray) -> np.ndarray:
        return _tile_symbols(chunk, metric_rows, bits, _boundary_states(chunk, metric_rows, bits))

    return _in_chunks(fixed, encode)


def search_from_both_ends(fixed: np.ndarray, levels: np.ndarray, bits: int) -> np.ndarray:
    """Encode tiles by two searches that meet, each half as long, which find paths of the same cost; ties are decided otherwise.

    Backward the trellis is the same one with the bits of windows and states in reverse, and its ties go by these. The state after pair 127
    has the smallest sum of two costs (ties: lowest state): forward over pairs 96..127, backward over pairs 31..0. From there one search
    goes forward over pairs 0..63 and one backward over pairs 127..64, and the state between them is found in the same way.

    Arguments and result are those of `search`; the number of pairs is even.

    Reference: the forward and backward recursions of Bahl et al. 1974 (IEEE Transactions on Information Theory 20), with minima in place of
    sums of probabilities.
    """
    turned, mirror = reversed_windows(len(levels)), reversed_windows(len(levels) >> bits)
    ahead, back = _metric_rows(levels), _metric_rows(levels[turned])

    def encode(chunk: np.ndarray) -> np.ndarray:
        half, steps = chunk.shape[1] // 2, min(BOUNDARY_STEPS, chunk.shape[1])
        anywhere = np.zeros((len(chunk), len(mirror)), np.float32)
        around = _forward(chunk[:, -steps:], ahead, bits, anywhere)[1], _forward(chunk[:, :steps][:, ::-1], back, bits, anywhere)[1]
        boundary = (around[0] + around[1][:, mirror]).argmin(axis=1)
        first, first_cost = _forward(chunk[:, :half], ahead, bits, _costs_from(boundary, len(mirror)))
        last, last_cost = _forward(chunk[:, half:][:, ::-1], back, bits, _costs_from(mirror[boundary], len(mirror)))
        meeting = (first_cost + last_cost[:, mirror]).argmin(axis=1)
        windows = _trace_back(first, meeting, bits)[0], turned[_trace_back(last, mirror[meeting], bits)[0]][:, ::-1]
        return _symbols_of(np.concatenate(windows, axis=1), bits)

    return _in_chunks(fixed, encode)


def reversed_windows(count: int) -> np.ndarray:
    """For each window below `count`, a power of two, the one with its bits in reverse; int64 [count]. States are as good."""
    bits = count.bit_length() - 1
    return sum((np.arange(count) >> bit & 1) << bits - 1 - bit for bit in range(bits))


def _in_chunks(fixed: np.ndarray, encode: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Symbols of all tiles, integers [tiles, 2 * pairs]; `encode` gets a few, [n, pairs, 2], and returns uint8 [n, pairs]."""
    pairs = fixed.shape[1] // 2
    symbols = np.empty((len(fixed), pairs), np.uint8)
    for start in range(0, len(fixed), _TILES_AT_ONCE):
        symbols[start : start + _TILES_AT_ONCE] = encode(fixed[start : start + _TILES_AT_ONCE].reshape(-1, pairs, 2))
    return symbols


def _metric_rows(levels: np.ndarray) -> np.ndarray:
    """float32 [3, 65536] so that m = [X0, X1, 1] @ rows; every partial sum is an integer below 2^24, so it is exact."""
    wide = levels.astype(np.float32)
    return np.stack([-wide[:, 0], -wide[:, 1], 2 * (wide**2).sum(axis=1)])


def _boundary_states(chunk: np.ndarray, metric_rows: np.ndarray, bits: int) -> np.ndarray:
    """The state after the last pair of each tile [n], from the pairs around the tile's boundary."""
    steps = min(BOUNDARY_STEPS, chunk.shape[1])
    around = np.concatenate([chunk[:, -steps:], chunk[:, :steps]], axis=1)
    cost = np.zeros((len(chunk), metric_rows.shape[1] >> bits), np.float32)
    decisions, cost = _forward(around, metric_rows, bits, cost)
    last = cost.argmin(axis=1)
    return _trace_back(decisions[steps:], last, bits)[1]


def _tile_symbols(chunk: np.ndarray, metric_rows: np.ndarray, bits: int, boundary: np.ndarray) -> np.ndarray:
    """Symbols [n, pairs] of the best path that starts and ends in the state `boundary` [n]."""
    decisions, _ = _forward(chunk, metric_rows, bits, _costs_from(boundary, metric_rows.shape[1] >> bits))
    return _symbols_of(_trace_back(decisions, boundary, bits)[0], bits)


def _costs_from(state: np.ndarray, states: int) -> np.ndarray:
    """Start costs of paths from one state each, int [n]: float32 [n, states]."""
    cost = np.full((len(state), states), FORBIDDEN_COST, np.float32)
    cost[np.arange(len(state)), state] = 0
    return cost


def _symbols_of(windows: np.ndarray, bits: int) -> np.ndarray:
    """The low bits of windows, uint8."""
    return (windows & (1 << bits) - 1).astype(np.uint8)


def _forward(pairs: np.ndarray, metric_rows: np.ndarray, bits: int, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Run the steps of the module's recursion.

    Args:
        pairs: integers [n, steps, 2].
        metric_rows: from `_metric_rows`.
        bits: bits per pair.
        cost: float32 [n, states], start costs.

    Returns:
        The best low bits of each state after each step, uint8 [steps, n, states], and the final costs.
    """
    count, steps, _ = pairs.shape
    states = cost.shape[1]
    decisions = np.empty((steps, count, states), np.uint8)
    inputs = np.ones((count, 3), np.float32)
    candidates = np.empty((count, metric_rows.shape[1]), np.float32)
    for step in range(steps):
        inputs[:, :2] = pairs[:, step]
        np.matmul(inputs, metric_rows, out=candidates)
        # The low 16 - b bits of a window are the state before it, its high 16 - b bits the state after it.
        by_previous = candidates.reshape(count, 1 << bits, states)
        by_previous += cost[:, None, :]
        by_next = candidates.reshape(count, states, 1 << bits)
        best = by_next.argmin(axis=2)
        cost = np.take_along_axis(by_next, best[:, :, None], axis=2)[:, :, 0]
        cost -= cost.min(axis=1, keepdims=True)
        decisions[step] = best
    return decisions, cost


def _trace_back(decisions: np.ndarray, last: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Follow decisions [steps, n, states] back from the states `last` [n]: int64 windows [n, steps] and the states before step 0 [n]."""
    steps, count, states = decisions.shape
    windows = np.empty((count, steps), np.int64)
    state, rows = last, np.arange(count)
    for step in reversed(range(steps)):
        windows[:, step] = state << bits | decisions[step, rows, state]
        state = windows[:, step] & (states - 1)
    return windows, state
