"""What quantizing a model costs in quality, one JSON file per recipe: septet's codes, plain integers, GPTQ and AWQ, side by side.

    python benchmarks/quality.py MODEL --list
    python benchmarks/quality.py MODEL --recipe gptq-4 --recipe split-feedback
    python benchmarks/quality.py MODEL --main
    python benchmarks/quality.py MODEL --ladder
    python benchmarks/quality.py MODEL --judge CHECKPOINT --name trellis-tuned --title "trellis, tuned" --table ladder --order 5

All recipes see the same calibration tokens and are judged on the same windows. Results that are there are not computed again (--again
does); results of another text or model are refused, as they could not stand in one table. `tools/draw_quality.py` makes
docs/quality.md from the files; benchmarks/results/README.md says what is in them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from quality_ggml import is_available
from quality_judge import RememberedReference, calibration_windows, judge, quantize_model, sensitivity_of, written_windows
from quality_recipes import FAMILIES, LADDER, MAIN, RECIPES
from quality_results import Slice, file_of, finished, machine_facts, save

from septet import loading
from septet.cli.output import quiet_libraries
from septet.errors import SeptetError
from septet.evaluation import Windows, cut_windows, score_models
from septet.evaluation.storage import effective_bits

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "src" / "septet" / "data" / "sample.txt"
BLOCKS_ONLY = "linear layers of the blocks; head, embedding and norms are the reference's"
AS_STORED = "everything as stored"


def main() -> int:
    """Run what the command line asks for; returns the exit status."""
    arguments = parse_arguments()
    if arguments.list:
        for name, recipe in RECIPES.items():
            print(f"{name:24}{recipe.title}")
        return 0
    quiet_libraries()
    try:
        run(arguments)
    except SeptetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the unquantized model")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", action="append", choices=RECIPES, metavar="NAME", help="may be given several times")
    what.add_argument("--main", action="store_true", help=f"{len(MAIN)} recipes, one of each kind")
    what.add_argument("--ladder", action="store_true", help="the steps from plain rounding to the default effort of `septet quantize`")
    what.add_argument("--all", action="store_true", help="every recipe but trellis, which `septet quantize` makes")
    what.add_argument("--judge", type=Path, metavar="PATH", help="a septet directory, a Hugging Face directory or a .gguf file")
    what.add_argument("--list", action="store_true", help="show the recipes")
    parser.add_argument("--name", help="with --judge: name of the result file")
    parser.add_argument("--title", help="with --judge: what a table calls it")
    parser.add_argument("--family", default="trellis", choices=FAMILIES, help="with --judge: which colour it gets in the plot")
    parser.add_argument("--note", default="", help="with --judge: how it was made; stands in the result file")
    parser.add_argument("--made-in", type=float, metavar="SECONDS", help="with --judge: how long `septet quantize` took")
    parser.add_argument("--activations", choices=loading.ACTIVATIONS, help="with --judge of a septet directory")
    parser.add_argument("--table", action="append", help="tables it belongs to, default: comparison, or ladder")
    parser.add_argument("--order", type=float, default=0, help="its place in tables that are not sorted by bits")
    parser.add_argument("--suffix", default="", help="ends the names of result files, to tell those of another model or text apart")
    parser.add_argument("--model-name", help="what results call the model; default: the directory's name")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="text to judge on")
    parser.add_argument("--text-bytes", type=Slice.parse_range, default=(254_100, None), metavar="FROM:TO", help="the part of it to use")
    parser.add_argument("--calibration-text", type=Path, default=SAMPLE)
    parser.add_argument("--calibration-bytes", type=Slice.parse_range, default=(0, 200_000), metavar="FROM:TO")
    parser.add_argument("--calibration-tokens", type=int, default=16_384)
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="folder of the result files")
    parser.add_argument("--again", action="store_true", help="compute results that are there once more")
    arguments = parser.parse_args()
    if arguments.judge and not arguments.name:
        parser.error("--judge needs --name")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Compute all results that are asked for and not there."""
    text = Slice.read(arguments.text, arguments.text_bytes)
    protocol = {
        "model": arguments.model_name or arguments.model.resolve().name,
        "text": text.described(),
        "context": arguments.context,
        "score": "half",
    }
    names = [arguments.name] if arguments.judge else chosen_recipes(arguments)
    files = {name: file_of(arguments.out, name + arguments.suffix) for name in names}
    missing = [name for name, path in files.items() if arguments.again or not finished(path, protocol)]
    for name in names:
        if name not in missing:
            print(f"{name}: already there")
    if not missing:
        return
    windows = cut_windows(loading.load_tokenizer(arguments.model), text.content, arguments.context, "half")
    reference = RememberedReference(loading.load_model(arguments.model, torch.float32))
    for name in missing:
        make = judge_stored if arguments.judge else judge_recipe
        result = make(name, arguments, windows, reference)
        tables, order = (["ladder"], 1 + LADDER.index(name)) if name in LADDER else (["comparison"], 0)
        described = {"tables": arguments.table or tables, "order": arguments.order or order, "protocol": protocol}
        counts = {"tokens": len(windows.tokens) * windows.scored, "windows": len(windows.tokens)}
        facts = machine_facts(ROOT, command_line(arguments, name))
        save(files[name], {"name": files[name].stem} | described | result | counts | facts)
        print(f"{name}: {result['effective_bits']:.3f} bits, KL {result['kld_mean']:.4f} +- {result['kld_stderr']:.4f}")


def chosen_recipes(arguments: argparse.Namespace) -> list[str]:
    """The names of the recipes to run."""
    if arguments.main:
        return list(MAIN)
    if arguments.ladder:
        return list(LADDER)
    left_out = {"trellis"} if is_available() else {"trellis", "llama.cpp"}
    return arguments.recipe or [name for name, recipe in RECIPES.items() if recipe.family not in left_out]


def judge_recipe(name: str, arguments: argparse.Namespace, windows: Windows, reference: RememberedReference) -> dict:
    """Quantize and judge; what is particular to this result."""
    recipe = RECIPES[name]
    text = Slice.read(arguments.calibration_text, arguments.calibration_bytes)
    started = time.perf_counter()
    size = arguments.context, arguments.calibration_tokens
    seen = written_windows(arguments.model, *size) if recipe.own_text else calibration_windows(arguments.model, text.content, *size)
    sensitivity = sensitivity_of(arguments.model, seen) if recipe.sensitive else None
    weights, bits = quantize_model(arguments.model, recipe, seen, shower(name, "groups"), sensitivity)
    quantized = time.perf_counter()
    figures = judge(arguments.model, weights, windows, reference, shower(name, "windows"))
    return {
        "title": recipe.title,
        "family": recipe.family,
        "calibration": ({} if recipe.own_text else text.described()) | {"tokens": seen.numel()} if recipe.calibrated else None,
        "activations": "float",
        "scope": BLOCKS_ONLY,
        "note": "",
        "effective_bits": bits,
        **figures,
        "seconds": {"quantize": round(quantized - started, 1), "evaluate": round(time.perf_counter() - quantized, 1)},
    }


def judge_stored(name: str, arguments: argparse.Namespace, windows: Windows, reference: RememberedReference) -> dict:
    """Judge a model on disk; what is particular to this result."""
    started = time.perf_counter()
    model = loading.load_model(arguments.judge, torch.float32, arguments.activations)
    head = model.get_output_embeddings()
    linear = [layer for layer, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
    figures = score_models(model, windows, reference, shower(name, "windows"))
    septet_made = loading.is_septet(arguments.judge)
    return {
        "title": arguments.title or name,
        "family": arguments.family,
        "calibration": None,
        "activations": arguments.activations or ("as the checkpoint asks" if septet_made else "float"),
        "scope": AS_STORED,
        "note": arguments.note,
        "effective_bits": effective_bits(arguments.judge, linear)[0],
        **figures,
        "seconds": {"quantize": arguments.made_in, "evaluate": round(time.perf_counter() - started, 1)},
    }


def command_line(arguments: argparse.Namespace, name: str) -> str:
    """The command that makes this one result again, without the folders of this machine."""
    what = f"--judge {arguments.judge.name} --name {name}" if arguments.judge else f"--recipe {name}"
    first, last = (f"{start}:{'' if stop is None else stop}" for start, stop in (arguments.text_bytes, arguments.calibration_bytes))
    parts = [
        f"python benchmarks/quality.py {arguments.model.resolve().name} {what}",
        f"--text {arguments.text.name} --text-bytes {first} --context {arguments.context}",
        f"--calibration-text {arguments.calibration_text.name} --calibration-bytes {last}",
        f"--calibration-tokens {arguments.calibration_tokens}",
    ]
    if arguments.suffix:
        parts.append(f"--suffix={arguments.suffix}")
    if arguments.activations:
        parts.append(f"--activations {arguments.activations}")
    return " ".join(parts)


def shower(name: str, unit: str):
    """A function that shows progress on stderr, on one line."""

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty() or done == total:
            print(f"\r{name}: {done} of {total} {unit}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
