"""What the native engine promises besides speed: loading, memory, idle threads, and two processes on one machine, as CSV rows.

    python benchmarks/engine_checks.py MODEL --csv benchmarks/results/cpu/checks.csv

MODEL is a septet directory that fits twice into memory. Two processes that run together are compared with one alone, in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from septet.bench.models import Contender, Worker
from septet.bench.provenance import append_rows, provenance
from septet.quantize.threads import default_threads

__all__ = ["main"]

_IDLE_SECONDS = 2.0


def main() -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--decode", type=int, default=64, help="tokens of a turn")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    threads = arguments.threads or default_threads()
    contender = Contender(arguments.model, "native", threads)
    rows = []
    for check, value, unit, bound in [*loading(contender, arguments.rounds), *together(contender, arguments.rounds, arguments.decode)]:
        rows.append({"check": check, "model": arguments.model.name, "threads": threads, "value": value, "unit": unit, "bound": bound})
        print(f"{check}: {value:.4g} {unit} (bound {bound})")
    if arguments.csv is not None:
        facts = provenance("python", "benchmarks/engine_checks.py", *sys.argv[1:])
        append_rows(arguments.csv, [row | facts for row in rows])
    return 0


def loading(contender: Contender, rounds: int) -> Iterator[tuple[str, float, str, str]]:
    """Time, memory, and what threads cost that have nothing to do; the file is in the page cache after the first load."""
    found = []
    for _ in range(rounds + 1):
        with Worker(contender) as worker:
            found.append(worker.loading)
            worker.ask("decode 8")
            idle = worker.ask(f"idle {_IDLE_SECONDS}")["cpu_seconds"]
    seconds = statistics.median(one["load_seconds"] for one in found[1:])
    size = found[0]["file_mb"]
    yield "load, file in the page cache", seconds, "s", "1 for 500 MB"
    yield "load, per 500 MB", seconds * 500 / size, "s", "1"
    grown = statistics.median(one["load_rss_mb"] for one in found)
    yield "growth of the resident set while loading, of the file", grown / size, "x", "1.15"
    yield "processor time of idle threads", 100 * idle / _IDLE_SECONDS, "%", "0"


def together(contender: Contender, rounds: int, decode: int) -> Iterator[tuple[str, float, str, str]]:
    """Two processes with all threads each, beside one alone."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        workers = [stack.enter_context(Worker(contender)) for _ in range(2)]
        alone, both = [], []
        for turn in range(rounds):
            alone.append(workers[turn % 2].ask(f"decode {decode}")["tok_per_s"])
            both.append(sum(answer["tok_per_s"] for answer in pool.map(lambda worker: worker.ask(f"decode {decode}"), workers)))
    yield "two processes together, of one alone", statistics.median(both) / statistics.median(alone), "x", "1"


if __name__ == "__main__":
    sys.exit(main())
