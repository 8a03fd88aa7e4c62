"""Products of the native backend beside the speed at which the same memory can be read.

The weights are random: every byte string is a valid matrix, and kernels take the same time for any. A round times each case once,
next to a plain sum over the very buffer that the product reads, with the same threads; figures are medians over the rounds.
`product` (not for split) is given quantized activations; `layer` rotates and quantizes its inputs and rotates its outputs too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from septet.bench.rounds import median, spread
from septet.errors import OptionError
from septet.kernels import native
from septet.kernels.weights import LayerWeights

__all__ = ["CODES", "KernelCase", "measure_kernels"]

#: Code as a user names it -> (code, bits per pair).
CODES = {"trellis": ("trellis", 7), "trellis-3": ("trellis", 6), "trellis-4": ("trellis", 8), "split": ("split", 7), "int8": ("int8", 16)}
_LEAST_SECONDS = 0.05
_ROTATION = 256


@dataclass(frozen=True)
class KernelCase:
    """One matrix and one way to multiply with it.

    Args:
        code: a key of CODES.
        k: inputs.
        n: outputs.
        tokens: M.
        threads: how many may work.
    """

    code: str
    k: int
    n: int
    tokens: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise OptionError(f"a code must be one of {', '.join(CODES)}", self.code, "choose one of them")
        for name in ("k", "n", "tokens", "threads"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1", getattr(self, name), "choose another")


def measure_kernels(cases: Sequence[KernelCase], rounds: int = 5, progress: Callable[[int, int], None] | None = None) -> list[dict]:
    """Time products.

    Args:
        cases: matrices of the same code and size share their memory when they stand next to each other.
        rounds: how often each case is timed, at least 1.
        progress: called with (cases done, all cases) after each of them.

    Returns:
        A row per case and name ("product", "layer"): name, code, k, n, tokens, threads, gweight_per_s, gb_per_s (of packed weights),
        bandwidth_gb_per_s (of the plain sum), bandwidth_fraction, and spread, the range of gweight_per_s over its median.

    Raises:
        OptionError: `rounds` is too small.
    """
    if rounds < 1:
        raise OptionError("rounds must be at least 1", rounds, "use 5")
    rows: list[dict] = []
    matrix, key = None, None
    for done, case in enumerate(cases):
        if key != (case.code, case.k, case.n):
            matrix, key = None, (case.code, case.k, case.n)  # the old one goes before the new one comes
            matrix = _random_layer(case)
        rows += _measure(case, matrix, rounds)
        if progress is not None:
            progress(done + 1, len(cases))
    return rows


def _random_layer(case: KernelCase) -> LayerWeights:
    """Weights of any value in their own memory."""
    code, bits = CODES[case.code]
    rng = np.random.default_rng(0)
    half = np.float16
    block_in, block_out = (math.gcd(size, _ROTATION) for size in (case.k, case.n))
    if code == "int8":
        packed = rng.integers(-127, 128, (case.n, case.k), np.int8)
    else:
        packed = rng.integers(0, 256, (-(-case.n // 64), -(-case.k // 4) * 16 * bits), np.uint8)
    scale = rng.random((case.n, 2) if code == "split" else case.n).astype(half)
    if code == "split":
        return LayerWeights(code, bits, case.k, case.n, packed, scale, scale.copy())
    signs = (2 * rng.integers(0, 2, case.k) - 1).astype(half)
    blocks = {"input_block": block_in, "output_block": block_out if code == "trellis" else 1}
    return LayerWeights(code, bits, case.k, case.n, packed, scale, input_scale=signs, **blocks)


def _measure(case: KernelCase, matrix: LayerWeights, rounds: int) -> list[dict]:
    memory = matrix.packed.reshape(-1).view(np.uint8)
    calls = dict(_calls(case, matrix))
    calls["read"] = lambda: native.read_sum(memory, case.threads)
    repeats = {name: _repeats(call) for name, call in calls.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            seconds[name].append(_time(call, repeats[name]))
    reading = [memory.nbytes / 1e9 / value for value in seconds.pop("read")]
    rows = []
    for name, taken in seconds.items():
        weights = [case.k * case.n / 1e9 / value for value in taken]
        rows.append({
            "name": name, "code": case.code, "k": case.k, "n": case.n, "tokens": case.tokens, "threads": case.threads,
            "gweight_per_s": median(weights), "gb_per_s": median(weights) * memory.nbytes / (case.k * case.n),
            "bandwidth_gb_per_s": median(reading),
            "bandwidth_fraction": median([memory.nbytes / 1e9 / one / other for one, other in zip(taken, reading)]),
            "spread": spread(weights), "rounds": rounds,
        })  # fmt: skip
    return rows


def _calls(case: KernelCase, matrix: LayerWeights) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed: name and a function without arguments."""
    x = np.random.default_rng(1).standard_normal((case.tokens, case.k)).astype(np.float32)
    prepared = native.prepare(matrix)
    linear = {"trellis": native.linear_trellis, "split": native.linear_split, "int8": native.linear_int8}[matrix.code]
    if matrix.code == "int8":
        scale, (xq, steps) = matrix.scale.astype(np.float32), native.quantize_activations(x, case.k)
        yield "product", lambda: native.int8_product(matrix.packed, scale, xq, steps, case.threads)
    elif matrix.code == "trellis":
        padded = np.pad(x, ((0, 0), (0, -case.k % 4)))
        xq, steps = native.quantize_activations(padded, padded.shape[1])
        yield "product", lambda: native.trellis_product(matrix.packed, matrix.bits_per_pair, xq, steps, padded.shape[1], case.threads)
    yield "layer", lambda: linear(x, prepared, "int8", case.threads)


def _repeats(call: Callable[[], object]) -> int:
    """Calls that take long enough to be timed; the first one warms up."""
    call()
    return max(1, math.ceil(_LEAST_SECONDS / max(_time(call, 1), 1e-9)))


def _time(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - started) / repeats
