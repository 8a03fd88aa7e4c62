"""Whole models against each other: each contender in a process of its own, which takes its turn and otherwise sleeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from septet.bench.rounds import median, spread
from septet.errors import OptionError, SeptetError, UnsupportedModelError

__all__ = ["ENGINES", "Contender", "Worker", "measure_models", "worker_environment"]

ENGINES = ("native", "transformers", "llama.cpp")
_OPENMP_WAITS = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Contender:
    """A model and what runs it.

    Args:
        model: a directory, or a .gguf file for llama.cpp.
        engine: one of ENGINES.
        threads: how many may work.
    """

    model: Path
    engine: str
    threads: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"an engine must be one of {', '.join(ENGINES)}", self.engine, "choose one of them")
        if self.threads < 1:
            raise OptionError("threads must be at least 1", self.threads, "choose another")


def measure_models(
    contenders: Sequence[Contender],
    prefill: int = 512,
    decode: int = 128,
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict]:
    """Time prompts and single tokens.

    Args:
        contenders: take turns in every round.
        prefill: tokens of a prompt.
        decode: tokens one after the other, behind a prompt of 16.
        rounds: at least 1.
        progress: called with (turns taken, all turns).

    Returns:
        A row per contender: model, engine, type, threads, prefill, decode (tokens), prefill_tok_per_s, decode_tok_per_s, peak_rss_mb,
        prefill_spread and decode_spread (range over median), rounds, load_seconds (after imports), file_mb and load_rss_mb (growth of
        the resident set while loading).

    Raises:
        OptionError: a number is below 1.
        UnsupportedModelError: a contender cannot run its model; the message is its own.
    """
    for name, value in (("prefill", prefill), ("decode", decode), ("rounds", rounds)):
        if value < 1:
            raise OptionError(f"{name} must be at least 1", value, "choose another")
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(contender)) for contender in contenders]
        for worker in workers:
            worker.ask("decode 4")  # warms up
        speeds: list[dict[str, list[float]]] = [{"prefill": [], "decode": []} for _ in workers]
        for turn in range(rounds * len(workers)):
            at = turn % len(workers)
            for kind, count in (("prefill", prefill), ("decode", decode)):
                speeds[at][kind].append(workers[at].ask(f"{kind} {count}")["tok_per_s"])
            if progress is not None:
                progress(turn + 1, rounds * len(workers))
        sizes = {"prefill": prefill, "decode": decode}
        return [_row(worker, found, sizes, rounds) for worker, found in zip(workers, speeds)]


def _row(worker: Worker, speeds: dict[str, list[float]], sizes: dict[str, int], rounds: int) -> dict:
    contender = worker.contender
    return {
        "model": contender.model.name, "engine": contender.engine, "type": worker.kind, "threads": contender.threads, **sizes,
        "prefill_tok_per_s": median(speeds["prefill"]), "decode_tok_per_s": median(speeds["decode"]),
        "peak_rss_mb": worker.ask("memory")["peak_rss_mb"],
        "prefill_spread": spread(speeds["prefill"]), "decode_spread": spread(speeds["decode"]), "rounds": rounds,
        **worker.loading,
    }  # fmt: skip


def worker_environment(contender: Contender) -> dict[str, str]:
    """The variables of a process that is timed: this one's, but OpenMP as its engine runs fastest.

    The command septet asks OpenMP's threads to sleep while they wait, for torch's sake. llama.cpp's meet hundreds of times a token and
    would decode at a fifth to two thirds of their speed, so its process gets OpenMP's default: they spin for a moment, then sleep.

    Args:
        contender: what the process runs.

    Returns:
        All variables of the process, by name.
    """
    variables = {name: value for name, value in os.environ.items() if name != _OPENMP_WAITS}
    variables |= {"OMP_NUM_THREADS": str(contender.threads), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return variables | ({_OPENMP_WAITS: "PASSIVE"} if contender.engine == "transformers" else {})


class Worker:
    """A process of `septet.bench.worker`; a context that ends it.

    Args:
        contender: what it runs.

    Attributes:
        kind: what the model's weights are, once it is loaded.
        loading: load_seconds, file_mb and load_rss_mb.
    """

    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.kind = ""
        self.loading: dict[str, float] = {}

    def __enter__(self) -> Worker:
        arguments = [self.contender.engine, str(self.contender.model), str(self.contender.threads)]
        command = [sys.executable, "-m", "septet.bench.worker", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._process = subprocess.Popen(command, **pipes, text=True, env=worker_environment(self.contender))
        self.loading = self._answer()
        self.kind = self.loading.pop("type")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> dict:
        """Send a line as `septet.bench.worker` understands it, wait for the answer.

        Raises:
            UnsupportedModelError: the process has ended; the message is its own.
        """
        print(command, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        _, errors = self._process.communicate()
        last = (errors.strip().splitlines() or [f"an end with exit code {self._process.returncode} and no message"])[-1]
        requirement = f"{self.contender.engine} must be able to run {self.contender.model}"
        raise UnsupportedModelError(requirement, last.removeprefix(f"{SeptetError.__module__}."), "choose another engine or model")
