"""Products of the compiled backends beside each other, and beside the speed at which the same memory can be read.

The weights are random: every byte string is a valid matrix, and kernels take the same time for any. A round times each build once,
next to a plain sum over the stored weights (for `arranged` a copy is as large), with the same threads; figures are medians over the rounds.
`product` (not for split) is given quantized activations; `layer` rotates and quantizes its inputs and rotates its outputs too;
`arranged` (native) is a layer whose weights were copied in the instruction set's own order, as engines keep them.
One thread is timed in processor time, which other work on the machine stretches less than the time on the wall.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from septet.bench.rounds import median, spread
from septet.errors import OptionError
from septet.kernels import native, select_backend
from septet.kernels.weights import LayerWeights

__all__ = ["CODES", "KernelBuild", "KernelCase", "measure_kernels"]

#: Code as a user names it -> (code, bits per pair).
CODES = {"trellis": ("trellis", 7), "trellis-3": ("trellis", 6), "trellis-4": ("trellis", 8), "split": ("split", 7), "int8": ("int8", 16)}
_LEAST_SECONDS = 0.05
#: Backend -> its functions that list builds, name the one in use, and choose one.
_BUILDS = {
    "native": ("instruction_sets", "instruction_set", "set_instruction_set"),
    "fortran": ("compilers", "compiler", "set_compiler"),
}
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


class KernelBuild:
    """One build of a compiled backend, in use inside a `with` block.

    Args:
        name: "native" or "fortran", and perhaps an instruction set or a compiler behind a dash: "native-avx512", "fortran-flang".

    Raises:
        OptionError: there is no such build.
        BackendUnavailableError: it does not work here.
    """

    def __init__(self, name: str) -> None:
        self.backend, _, self.variant = name.partition("-")
        if self.backend not in _BUILDS:
            raise OptionError(f"a backend must be one of {', '.join(_BUILDS)}", name, "for example native or fortran-flang")
        self.module: ModuleType = select_backend(self.backend)
        listed, current, self._choose = (getattr(self.module, function) for function in _BUILDS[self.backend])
        self.variant = self.variant or current()
        obstacle = listed().get(self.variant, "unknown name")
        if obstacle:
            got = f"{name} ({obstacle})"
            raise OptionError(f"a build of {self.backend} must be one that works here", got, f"choose one of {', '.join(listed())}")

    @property
    def name(self) -> str:
        """For a row."""
        return f"{self.backend}-{self.variant}"

    def __enter__(self) -> None:
        """Use this build."""
        self._choose(self.variant)

    def __exit__(self, *exception: object) -> None:
        """Return to the build that is used without a choice."""
        self._choose(None)

    def threads(self, wanted: int) -> int:
        """How many threads really work: Fortran stays in the caller's."""
        return 1 if self.backend == "fortran" else wanted


def measure_kernels(
    cases: Sequence[KernelCase],
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
    builds: Sequence[str] = ("native",),
) -> list[dict]:
    """Time products.

    Args:
        cases: matrices of the same code and size share their memory when they stand next to each other.
        rounds: how often each case is timed, at least 1.
        progress: called with (cases done, all cases) after each of them.
        builds: names for KernelBuild; they take turns in every round.

    Returns:
        A row per case, name ("product", "layer", "arranged") and build: name, code, backend, k, n, tokens, threads, gweight_per_s,
        gb_per_s (of packed weights), bandwidth_gb_per_s (of the plain sum), bandwidth_fraction, of_first (speed in units of the first
        build's in the same round), and spread, the range of gweight_per_s over its median.

    Raises:
        OptionError: `rounds` is too small, or there is no such build.
        BackendUnavailableError: a backend does not work here.
    """
    if rounds < 1:
        raise OptionError("rounds must be at least 1", rounds, "use 5")
    rows: list[dict] = []
    contenders = [KernelBuild(name) for name in builds]
    matrix, key = None, None
    for done, case in enumerate(cases):
        if key != (case.code, case.k, case.n):
            matrix, key = None, (case.code, case.k, case.n)  # the old one goes before the new one comes
            matrix = _random_layer(case)
        rows += _measure(case, matrix, rounds, contenders)
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


def _measure(case: KernelCase, matrix: LayerWeights, rounds: int, builds: Sequence[KernelBuild]) -> list[dict]:
    memory = matrix.packed.reshape(-1).view(np.uint8)
    clock = time.thread_time if case.threads == 1 else time.perf_counter
    contenders: dict[tuple[int, str], Callable[[], object]] = {}
    for place, build in enumerate(builds):
        contenders |= {(place, name): call for name, call in _calls(case, matrix, build)}
    contenders[-1, "read"] = lambda: native.read_sum(memory, case.threads)
    repeats: dict[tuple[int, str], int] = {}
    seconds: dict[tuple[int, str], list[float]] = {key: [] for key in contenders}
    for index in range(rounds + 1):
        for key, call in contenders.items():
            with builds[key[0]]:
                if index:
                    seconds[key].append(_time(call, repeats[key], clock))
                else:
                    repeats[key] = _repeats(call, clock)
    reading = [memory.nbytes / 1e9 / value for value in seconds.pop((-1, "read"))]
    return [_row(case, memory.nbytes, name, builds[place], taken, reading, seconds[0, name]) for (place, name), taken in seconds.items()]


def _row(case: KernelCase, size: int, name: str, build: KernelBuild, taken: list[float], reading: list[float], first: list[float]) -> dict:
    weights = [case.k * case.n / 1e9 / value for value in taken]
    return {
        "name": name, "code": case.code, "backend": build.name, "k": case.k, "n": case.n, "tokens": case.tokens,
        "threads": build.threads(case.threads),
        "gweight_per_s": median(weights), "gb_per_s": median(weights) * size / (case.k * case.n),
        "bandwidth_gb_per_s": median(reading),
        "bandwidth_fraction": median([size / 1e9 / one / other for one, other in zip(taken, reading)]),
        "of_first": median([other / one for one, other in zip(taken, first)]),
        "spread": spread(weights), "rounds": len(taken),
    }  # fmt: skip


def _calls(case: KernelCase, matrix: LayerWeights, build: KernelBuild) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is timed: name and a function without arguments."""
    x = np.random.default_rng(1).standard_normal((case.tokens, case.k)).astype(np.float32)
    module = build.module
    threads = (case.threads,) if build.backend == "native" else ()
    prepared, linear = module.prepare(matrix), getattr(module, f"linear_{matrix.code}")
    if matrix.code == "int8":
        scale, (xq, steps) = matrix.scale.astype(np.float32), module.quantize_activations(x, case.k)
        yield "product", lambda: module.int8_product(matrix.packed, scale, xq, steps, *threads)
    elif matrix.code == "trellis":
        padded = np.pad(x, ((0, 0), (0, -case.k % 4)))
        xq, steps = module.quantize_activations(padded, padded.shape[1])
        yield "product", lambda: module.trellis_product(matrix.packed, matrix.bits_per_pair, xq, steps, padded.shape[1], *threads)
    yield "layer", lambda: linear(x, prepared, "int8", case.threads)
    if build.backend == "native" and matrix.code == "trellis":
        with build:
            arranged = module.prepare(matrix, arrange=True)
        yield "arranged", lambda: linear(x, arranged, "int8", case.threads)


def _repeats(call: Callable[[], object], clock: Callable[[], float]) -> int:
    """Calls that take long enough to be timed; the first one warms up."""
    call()
    return max(1, math.ceil(_LEAST_SECONDS / max(_time(call, 1, clock), 1e-9)))


def _time(call: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of one call."""
    started = clock()
    for _ in range(repeats):
        call()
    return (clock() - started) / repeats
