"""How long quantizing takes on GPUs, stage by stage, and how much of their memory.

    python benchmarks/quantize_gpu.py --shape 8b [--blocks 1 2] [--gpus 1 2] [--memory GB] [--stream] [--effort E] [--tokens T]
                                      [--parts]
    python benchmarks/quantize_gpu.py --model DIR [--keep OUT] [--seed N]

The first makes models with random weights in the shapes of a large one but with few blocks, quantizes each, and extrapolates: what two
models differ in is what a block costs, and the rest is paid once. Quantizing is timed block by block: those that only the longest model
has say what a further one takes, since the first ones pay for memory that is new to the process, most of all on the device that comes
first. Head and embedding are left as they are. With several numbers of GPUs it checks that all write the same bytes. `--memory` keeps
torch within so many GB of each GPU, `--stream` brings blocks one by one while text is written, as for a model that does not fit. One JSON
object per run; stages are wall seconds, and warm-up runs come first, on a small model and on one block of the shape, so that compiling
kernels and loading libraries is not counted. `--parts` says where the time goes, and takes a little more of it (`parts.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from parts import timed_parts

from septet import loading
from septet.calibration import sampling
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.integrity import sha256_of_file
from septet.checkpoint.stream import Hooks, Progress, quantize_checkpoint
from septet.cli.calibration import calibrate_with
from septet.cli.device import check_device, devices_of, let_segments_grow, quantizer_on

#: The number of the block that a layer is in.
_BLOCK = re.compile(r"\.layers\.(\d+)\.")
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


def run(source: Path, out: Path, options: QuantizeOptions, device: str, parts: bool = False) -> dict:
    """Quantize; seconds in all, by stage and, of quantizing, by block, the peak of what torch has taken on each GPU, perhaps parts."""
    seconds: dict[str, float] = defaultdict(float)
    blocks: dict[int, float] = defaultdict(float)
    last, since = Progress("load", ""), time.perf_counter()

    def show(event: Progress) -> None:
        nonlocal last, since
        now = time.perf_counter()
        seconds[last.stage] += now - since
        found = _BLOCK.search(last.name) if last.stage == "quantize" else None
        if found:
            blocks[int(found[1])] += now - since
        if event.stage != last.stage:
            print(f"{event.stage} {event.name}", file=sys.stderr, flush=True)
        last, since = event, now

    gpus = [] if device == "cpu" else devices_of(device)
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    calibrate = calibrate_with("self", options, 0, show, device) if options.effort else None
    hooks = Hooks(plan=loading.plan_checkpoint, progress=show, calibrate=calibrate, quantizer=quantizer_on(device))
    started = time.perf_counter()
    with timed_parts() if parts else nullcontext({}) as by_part:
        quantize_checkpoint(source, out, options, hooks)
    total = time.perf_counter() - started
    seconds[last.stage] += time.perf_counter() - since
    peaks = [round(torch.cuda.max_memory_allocated(gpu) / 2**30, 2) for gpu in gpus]
    found = {"seconds": round(total, 2), "stages": {name: round(value, 2) for name, value in seconds.items()}}
    found |= {"block_seconds": [round(value, 2) for _, value in sorted(blocks.items())], "peak_gib": peaks}
    return found | ({"parts": {name: round(value, 3) for name, value in by_part.items()}} if parts else {})


def extrapolate(runs: dict[int, dict], blocks: int) -> dict:
    """Seconds for a model with all blocks, stage by stage: a straight line through the shortest and the longest run, never downwards.

    Quantizing: the longest run, and for each further block what those take that only this one has.
    """
    few, many = min(runs), max(runs)
    first, last = runs[few]["stages"], runs[many]["stages"]
    per_block = {name: max(last[name] - first.get(name, 0.0), 0.0) / (many - few) for name in last}
    per_block["quantize"] = sum(runs[many]["block_seconds"][few:]) / (many - few)
    stages = {name: last[name] + (blocks - many) * slope for name, slope in per_block.items()}
    rounded = {name: round(value, 1) for name, value in stages.items()}
    return {"blocks": blocks, "stages": rounded, "seconds": round(sum(stages.values()), 1)}


def measure_shape(place: Path, shape: str, blocks: list[int], devices: list[str], options: QuantizeOptions, parts: bool) -> None:
    """Runs on models with random weights, on one device or list of devices after the other."""
    bare = QuantizeOptions(**options.as_json() | {"head": "keep"})
    made: dict[tuple[str, int], dict] = {}
    for number, count in enumerate([1, *blocks]):
        make_model(place / "model", shape, count, devices[0].split(",")[0])
        torch.cuda.empty_cache()
        written = set()
        for device in devices:
            made[device, count] = run(place / "model", place / "out", bare, device, parts)
            written.add(tuple(sha256_of_file(file) for file in sorted((place / "out").glob("*.safetensors"))))
            shutil.rmtree(place / "out")
            if number:
                print(json.dumps({"shape": shape, "blocks": count, "device": device, **made[device, count]}), flush=True)
        if len(written) > 1:
            raise SystemExit(f"{' and '.join(devices)} write different bytes")
        shutil.rmtree(place / "model")
    if len(blocks) > 1:
        for device in devices:
            runs = {count: made[device, count] for count in blocks}
            print(json.dumps({"device": device, "extrapolated": extrapolate(runs, SHAPES[shape][4])}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--memory", type=float, help="GB of each GPU")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--vocabulary", type=int, help="of the shape, instead of its own: a smaller one saves time that is not measured")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--effort", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="instead of --gpus")
    arguments = parser.parse_args()
    devices = [",".join(f"cuda:{number}" for number in range(count)) for count in arguments.gpus]
    devices = [arguments.device] if arguments.device else devices
    let_segments_grow()
    for device in devices:
        check_device(device)
        for gpu in devices_of(device) if arguments.memory else ():
            total = torch.cuda.get_device_properties(gpu).total_memory
            torch.cuda.set_per_process_memory_fraction(arguments.memory * 1e9 / total, gpu)
    if arguments.stream:
        sampling._MOST_BYTES_FOR_WEIGHTS = 0
    if arguments.vocabulary:
        SHAPES[arguments.shape] = (*SHAPES[arguments.shape][:5], arguments.vocabulary)
    calibration = "self" if arguments.effort else "none"
    options = QuantizeOptions(effort=arguments.effort, calibration=calibration, calibration_tokens=arguments.tokens, seed=arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        make_model(place / "tiny", "tiny", 2, devices[0].split(",")[0])
        run(place / "tiny", place / "tiny-out", options, devices[0])
        if arguments.model is not None:
            made = run(arguments.model, arguments.keep or place / "out", options, devices[0])
            print(json.dumps({"model": arguments.model.name, "seed": arguments.seed, **made}), flush=True)
            return
        measure_shape(place, arguments.shape, arguments.blocks, devices, options, arguments.parts)


if __name__ == "__main__":
    main()
