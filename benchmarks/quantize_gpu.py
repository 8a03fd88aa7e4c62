"""How long quantizing takes on one GPU, stage by stage, and how much of its memory.

    python benchmarks/quantize_gpu.py --shape 8b [--blocks 1 2] [--effort E] [--tokens T]
    python benchmarks/quantize_gpu.py --model DIR [--keep OUT] [--seed N]

The first makes models with random weights in the shapes of a large one but with few blocks, quantizes each, and extrapolates: what two
models differ in is what a block costs, and the rest is paid once. Head and embedding are left as they are. One JSON object per run; stages
are wall seconds, and a warm-up run on a small model comes first, so that compiling kernels and loading libraries is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from septet import loading
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.stream import Hooks, Progress, quantize_checkpoint
from septet.cli.calibration import calibrate_with
from septet.cli.device import check_device, quantizer_on

#: hidden, intermediate, heads, key-value heads, blocks, vocabulary
SHAPES = {
    "tiny": (256, 512, 4, 2, 2, 512),
    "8b": (4096, 14336, 32, 8, 32, 128256),
    "70b": (8192, 28672, 64, 8, 80, 128256),
}


def make_model(directory: Path, shape: str, blocks: int, device: str) -> None:
    """A LLaMA with random weights, bfloat16."""
    hidden, intermediate, heads, kv_heads, _, vocabulary = SHAPES[shape]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    model.to(torch.bfloat16).cpu().save_pretrained(directory)


def run(source: Path, out: Path, options: QuantizeOptions, device: str) -> dict:
    """Quantize; seconds by stage and in all, and the peak of what torch has taken on the GPU."""
    seconds: dict[str, float] = defaultdict(float)
    stage, since = "load", time.perf_counter()

    def show(event: Progress) -> None:
        nonlocal stage, since
        now = time.perf_counter()
        seconds[stage] += now - since
        if event.stage != stage:
            print(f"{event.stage} {event.name}", file=sys.stderr, flush=True)
        stage, since = event.stage, now

    on_gpu = device != "cpu"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    calibrate = calibrate_with("self", options, 0, show, device) if options.effort else None
    hooks = Hooks(plan=loading.plan_checkpoint, progress=show, calibrate=calibrate, quantizer=quantizer_on(device))
    started = time.perf_counter()
    quantize_checkpoint(source, out, options, hooks)
    total = time.perf_counter() - started
    seconds[stage] += time.perf_counter() - since
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_gpu else None
    return {"seconds": round(total, 2), "stages": {name: round(value, 2) for name, value in seconds.items()}, "peak_gib": peak}


def extrapolate(runs: dict[int, dict], blocks: int) -> dict:
    """Seconds for a model with all blocks, from runs with few: a straight line through the shortest and the longest."""
    few, many = min(runs), max(runs)
    per_block = (runs[many]["seconds"] - runs[few]["seconds"]) / (many - few)
    return {
        "blocks": blocks,
        "seconds_per_block": round(per_block, 2),
        "seconds": round(runs[few]["seconds"] + (blocks - few) * per_block, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--effort", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    check_device(arguments.device)
    calibration = "self" if arguments.effort else "none"
    options = QuantizeOptions(effort=arguments.effort, calibration=calibration, calibration_tokens=arguments.tokens, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model(place / "tiny", "tiny", 2, arguments.device)
        run(place / "tiny", place / "tiny-out", options, arguments.device)
        if arguments.model is not None:
            made = run(arguments.model, arguments.keep or place / "out", options, arguments.device)
            print(json.dumps({"model": arguments.model.name, "seed": arguments.seed, **made}), flush=True)
            return
        bare = QuantizeOptions(**options.as_json() | {"head": "keep"})
        runs = {}
        for blocks in arguments.blocks:
            make_model(place / str(blocks), arguments.shape, blocks, arguments.device)
            runs[blocks] = run(place / str(blocks), place / f"{blocks}-out", bare, arguments.device)
            print(json.dumps({"shape": arguments.shape, "blocks": blocks, **runs[blocks]}), flush=True)
        if len(runs) > 1:
            print(json.dumps({"extrapolated": extrapolate(runs, SHAPES[arguments.shape][4])}), flush=True)


if __name__ == "__main__":
    main()
