"""The Fortran kernels beside the C++ ones: whole layers, one thread, all builds in turn in one process.

    python benchmarks/fortran_kernels.py [--inputs K] [--outputs N] [--rounds R] [--json]

Each round runs every build once; a row is the median over the rounds, and the share of the C++ kernels with AVX-512 (without VBMI) and
with AVX-512 VBMI in the same rounds. Activation rounding and rotation are inside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import layers  # noqa: E402
from variants import chosen, variants  # noqa: E402


def make_layers(outputs: int, inputs: int) -> dict:
    """A random layer of every code."""
    rng = np.random.default_rng(0)
    blocks = min(inputs & -inputs, 256), min(outputs & -outputs, 256)
    return {
        "split": layers.split_layer(rng, outputs, inputs),
        "trellis": layers.trellis_layer(rng, 7, outputs, inputs, blocks),
        "int8": layers.int8_layer(rng, outputs, inputs, blocks[0]),
    }


def measure(layer, tokens: int, rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds of processor time of each build in each round; a busy machine stretches the time on the wall more than this."""
    x = np.random.default_rng(1).standard_normal((tokens, layer.in_features)).astype(np.float32)
    builds = [(backend, variant) for backend in ("native", "fortran") for variant in variants(backend) if variant != "scalar"]
    seconds = {build: [] for build in builds}
    for index in range(rounds + 1):
        for build in builds:
            with chosen(*build) as module:
                prepared, run = module.prepare(layer), getattr(module, f"linear_{layer.code}")
                run(x, prepared, "int8", 1)
                started = time.thread_time()
                run(x, prepared, "int8", 1)
                if index:
                    seconds[build].append(time.thread_time() - started)
    return seconds


def rows_of(code: str, tokens: int, weights: int, seconds: dict[tuple[str, str], list[float]]) -> list[dict]:
    """One row per build: Gweight/s, and shares of the C++ kernels, each the median over the rounds."""
    rows = []
    for (backend, variant), times in seconds.items():
        row = {"code": code, "tokens": tokens, "build": f"{backend} {variant}"}
        row["gweight_per_s"] = round(weights * tokens / statistics.median(times) / 1e9, 2)
        for name in ("avx512", "avx512vbmi"):
            base = seconds.get(("native", name))
            row[f"of_{name}"] = round(statistics.median(b / t for b, t in zip(base, times)), 3) if base else None
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="time Fortran beside C++")
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for code, layer in make_layers(arguments.outputs, arguments.inputs).items():
        for tokens in (1, 16):
            rows += rows_of(code, tokens, arguments.outputs * arguments.inputs, measure(layer, tokens, arguments.rounds))
    if arguments.json:
        print(json.dumps({"outputs": arguments.outputs, "inputs": arguments.inputs, "rows": rows}, indent=1))
        return 0
    print("| code | tokens | build | Gweight/s | of C++ AVX-512 | of C++ AVX-512 VBMI |\n| --- | ---: | --- | ---: | ---: | ---: |")
    for row in rows:
        print("| {code} | {tokens} | {build} | {gweight_per_s} | {of_avx512} | {of_avx512vbmi} |".format(**row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
