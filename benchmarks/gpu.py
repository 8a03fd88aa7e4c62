"""Linear layers on a GPU, checked and then timed beside their peers in one run.

    python benchmarks/gpu.py [--tokens 1 16 512] [--out benchmarks/results/gpu/NAME.csv]

A round is one replay of a CUDA graph that runs a layer on one set of weights after the other, together far more than the cache holds; the
figure is the median round over the number of layers. Rotations are part of our times. Energy is NVML's counter over a second of replays.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from septet import operators
from septet.kernels import LayerWeights, reference
from septet.operators import LayerDescription

SHAPES = ((4096, 4096), (4096, 11008), (8192, 8192), (8192, 28672), (28672, 8192))
WORKING_SET = 400_000_000
BLOCK = 256
Layer = Callable[[torch.Tensor], torch.Tensor]


def septet_layer(k: int, n: int, bits: int, activations: str = "int8", scales: str = "block") -> tuple[Layer, tuple, LayerDescription]:
    """A trellis layer of random bytes."""
    packed = torch.randint(0, 256, (n // 64, k // 4 * 16 * bits), dtype=torch.uint8, device="cuda")
    output_scale, input_scale = ((torch.rand(size, device="cuda") * 0.01 + 0.01).half() for size in (n, k))
    tensors = packed, output_scale, input_scale, None
    description = LayerDescription("trellis", bits, k, n, BLOCK, BLOCK, None, scales, activations)
    return lambda x: operators.linear(x, tensors, description), tensors, description


def triton_layer(k: int, n: int) -> Layer:
    """The same through the portable kernels."""
    layer = septet_layer(k, n, 7)[0]

    def run(x: torch.Tensor) -> torch.Tensor:
        os.environ["SEPTET_GPU"] = "triton"
        try:
            return layer(x)
        finally:
            del os.environ["SEPTET_GPU"]

    return run


def bf16_layer(k: int, n: int) -> Layer:
    """cuBLAS."""
    weight = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def int4_layer(k: int, n: int) -> Layer:
    """torch's own 4-bit product, groups of 128."""
    packed = torch.ops.aten._convert_weight_to_int4pack(torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda"), 8)
    scales = torch.rand(k // 128, n, 2, device="cuda", dtype=torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales)


#: name -> bits of a weight, largest number of tokens, maker
CONTENDERS: dict[str, tuple[float, int, Callable[[int, int], Layer]]] = {
    "bf16": (16, 1 << 30, bf16_layer),
    "septet-3.5": (3.5, 1 << 30, lambda k, n: septet_layer(k, n, 7)[0]),
    "septet-3.5-token": (3.5, 1 << 30, lambda k, n: septet_layer(k, n, 7, scales="token")[0]),
    "septet-3.5-float": (3.5, 1 << 30, lambda k, n: septet_layer(k, n, 7, "float")[0]),
    "septet-3.0": (3.0, 16, lambda k, n: septet_layer(k, n, 6)[0]),
    "septet-4.0": (4.0, 16, lambda k, n: septet_layer(k, n, 8)[0]),
    "septet-3.5-triton": (3.5, 16, triton_layer),
    "torch-int4": (4.25, 16, int4_layer),
}


def check() -> None:
    """Stop unless layers of 8192 inputs equal the reference: exactly with one scale per token, else to 1e-5 of the largest output."""
    for bits in (6, 7, 8):
        for scales, tolerance in (("token", 0.0), ("block", 1e-5)):
            run, tensors, description = septet_layer(8192, 512, bits, scales=scales)
            arrays = [None if tensor is None else tensor.cpu().numpy() for tensor in tensors]
            weights = LayerWeights("trellis", bits, 8192, 512, *arrays[:2], None, arrays[2], BLOCK, BLOCK, None, scales)
            for tokens in (1, 7, 16, 100):
                x = torch.randn(tokens, 8192, device="cuda")
                exact = reference.linear_trellis(x.cpu().numpy(), reference.prepare(weights), "int8")
                error = np.abs(run(x).cpu().numpy() - exact).max() / np.abs(exact).max()
                assert error <= tolerance, f"{bits} bits, {scales}, {tokens} tokens: error {error}"
    print("checked: every width, 1 to 100 tokens, against the reference", file=sys.stderr)


def captured(layers: list[Layer], x: torch.Tensor) -> torch.cuda.CUDAGraph:
    """A graph that runs all layers once."""
    for layer in layers:
        layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer(x)
    for _ in range(3):
        graph.replay()
    return graph


def rounds_of(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Microseconds of some replays."""
    times = []
    for _ in range(count):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return times


def millijoules(graph: torch.cuda.CUDAGraph, seconds: float = 1.0) -> float | None:
    """Energy of one replay by NVML's counter, or None without NVML."""
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    device = pynvml.nvmlDeviceGetHandleByIndex(0)
    torch.cuda.synchronize()
    before, start, replays = pynvml.nvmlDeviceGetTotalEnergyConsumption(device), time.monotonic(), 0
    while time.monotonic() - start < seconds:
        graph.replay()
        torch.cuda.synchronize()
        replays += 1
    return (pynvml.nvmlDeviceGetTotalEnergyConsumption(device) - before) / replays


def measure(name: str, k: int, n: int, tokens: int, energy: bool = False) -> dict[str, object] | None:
    """One row, or None where a contender does not load or run; with energy, that and nothing else."""
    bits, most, make = CONTENDERS[name]
    if tokens > most:
        return None
    copies = min(60, max(2, round(WORKING_SET / (k * n * bits / 8))))
    try:
        layers = [make(k, n) for _ in range(copies)]
        x = torch.randn(tokens, k, device="cuda", dtype=torch.bfloat16)
        graph = captured(layers, x)
    except (RuntimeError, AttributeError) as error:
        print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
        return None
    if energy:
        spent = millijoules(graph)
        return {"mj": None if spent is None else round(spent / copies, 3)}
    times = [value / copies for value in rounds_of(graph, 15)]
    middle = statistics.median(times)
    row = {"name": name, "bits": bits, "k": k, "n": n, "tokens": tokens, "us": round(middle, 2)}
    return row | {"us_min": round(min(times), 2), "us_max": round(max(times), 2), "gb_per_s": round(k * n * bits / 8 / middle / 1e3)}


def main() -> None:
    """Check, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64, 512, 2048])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    check()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    machine |= {"python": platform.python_version(), "commit": commit, "command": " ".join(["python", *sys.argv])}
    rows = []
    for tokens in options.tokens:
        for k, n in SHAPES if tokens <= 64 else SHAPES[2:]:
            baseline = None
            for name in CONTENDERS:
                row = measure(name, k, n, tokens)
                if row is None:
                    continue
                baseline = baseline or row["us"]
                row |= {"of_bf16": round(row["us"] / baseline, 3), "mj": ""}
                rows.append(row)
                print(f"{tokens:5d} {k:6d} x {n:<6d} {name:18s} {row['us']:9.1f} us  {row['of_bf16']:.3f}", flush=True)
    # last, since a second of full power slows what comes after
    for row in rows:
        if (row["tokens"], row["n"]) == (1, 28672) and "triton" not in row["name"]:
            row |= measure(row["name"], row["k"], row["n"], 1, energy=True)
            print(f"{row['name']:18s} {row['mj']} mJ at {row['k']} x {row['n']}", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *machine])
            writer.writeheader()
            writer.writerows(row | machine for row in rows)


if __name__ == "__main__":
    main()
