"""EXL3 beside septet on one GPU: the same model through both at the same bits, judged with float activations on the same tokens.

    python benchmarks/exl3.py MODEL --work DIR
    python benchmarks/exl3.py MODEL --work DIR --only exl3-3.5 --only septet-3.5

Needs a GPU that both can use, and exllamav3 (MIT licence; 1.6.5 was used, whose extension builds itself when it is first imported).
Each side quantizes MODEL with its own command, the head left alone. Then the linear layers of the blocks, dequantized to float32, take
the place of the original's, and one judge compares. Checkpoints stay in DIR, and what is there is not made again. One result file each,
for the table `exl3` of docs/quality.md; benchmarks/results/README.md says what is in them.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from quality import BLOCKS_ONLY, ROOT, SAMPLE
from quality_results import Slice, file_of, machine_facts, save
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from septet import checkpoint, loading
from septet.evaluation import Windows, cut_windows, score_models
from septet.layer import SeptetLinear

#: What exllamav3 calibrates on unless told otherwise.
EXL3_ROWS, EXL3_COLUMNS = 250, 2048
_EXL3_TEXT = f"the text that exllamav3 brings, {EXL3_ROWS} rows of {EXL3_COLUMNS} tokens, a sixth of them random"


@dataclass(frozen=True)
class Contender:
    """One way to quantize.

    Args:
        title: for a table.
        family: "exl3" or "trellis" (septet's code).
        bits: asked for.
        calibration: "" is the default of either side; else how many tokens septet takes from exllamav3's text.
    """

    title: str
    family: str
    bits: float
    calibration: int = 0


CONTENDERS = {
    **{f"exl3-{bits}": Contender(f"EXL3, {bits} bits, its default text", "exl3", bits) for bits in (3.0, 3.5, 4.0)},
    **{f"septet-{bits}": Contender(f"trellis, {bits} bits, default effort, no text", "trellis", bits) for bits in (3.0, 3.5, 4.0)},
    "septet-3.5-text": Contender("trellis, 3.5 bits, default effort, 16 K tokens of EXL3's text", "trellis", 3.5, 16_384),
    "septet-3.5-text-64k": Contender("trellis, 3.5 bits, default effort, 64 K tokens of EXL3's text", "trellis", 3.5, 65_536),
}


def main() -> int:
    """Make and judge what is asked for; returns the exit status."""
    arguments = parse_arguments()
    arguments.work.mkdir(parents=True, exist_ok=True)
    text = Slice.read(arguments.text, arguments.text_bytes)
    cut = cut_windows(loading.load_tokenizer(arguments.model), text.content, arguments.context, "half")
    windows = Windows(cut.tokens.cuda(), cut.first, cut.starts_with_bos)
    reference = loading.load_model(arguments.model, torch.float32).cuda()
    protocol = {
        "model": arguments.model_name or arguments.model.resolve().name,
        "text": text.described(),
        "context": arguments.context,
        "score": "half",
    }
    for name in arguments.only or CONTENDERS:
        contender, place = CONTENDERS[name], arguments.work / name
        make(contender, arguments.model, place)
        started = time.perf_counter()
        figures = judge(contender, place, windows, reference)
        result = {
            "name": name + arguments.suffix,
            "tables": arguments.table or ["exl3"],
            "order": 0,
            "protocol": protocol,
            **described(contender, place, linear_layers(reference)),
            **figures,
            "seconds": {"quantize": seconds_of(place), "evaluate": round(time.perf_counter() - started, 1)},
            "tokens": len(cut.tokens) * cut.scored,
            "windows": len(cut.tokens),
            **facts(arguments, name),
        }
        save(file_of(arguments.out, result["name"]), result)
        bits = f"{result['effective_bits']:.3f} bits ({result['stored_bits']:.3f} with padding)"
        print(f"{result['name']}: {bits}, KL {figures['kld_mean']:.4f} +- {figures['kld_stderr']:.4f}", flush=True)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory of the unquantized model")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints; a model has one of its own")
    parser.add_argument("--only", action="append", choices=CONTENDERS, metavar="NAME", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--text", type=Path, default=SAMPLE, help="text to judge on")
    parser.add_argument("--text-bytes", type=Slice.parse_range, default=(0, None), metavar="FROM:TO", help="the part of it to use")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--model-name", help="what results call the model; default: the directory's name")
    parser.add_argument("--table", action="append", help="tables that results belong to, default: exl3")
    parser.add_argument("--suffix", default="", help="ends the names of result files")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality", help="folder of the result files")
    return parser.parse_args()


def make(contender: Contender, model: Path, place: Path) -> None:
    """Quantize with the tool's own command, unless it is done; notes how long it took.

    Raises:
        RuntimeError: the command failed.
    """
    if seconds_of(place) is not None:
        return
    if contender.family == "exl3":
        wide = widened(model, Path(f"{place}.wide"))
        options = ["-i", wide, "-o", place, "-w", f"{place}.work", "-b", contender.bits, "-hb", 16]
        words = ["exllamav3.conversion.convert_model", *options]
    else:
        words = ["septet", "quantize", model, place, "--device", "cuda", "--bits", contender.bits, "--head", "keep"]
        if contender.calibration:
            text = place.with_name(f"{place.name}.txt")
            text.write_text(exl3_text(model), encoding="utf-8")
            words += ["--calibration", text, "--calibration-tokens", contender.calibration]
    started = time.perf_counter()
    outcome = subprocess.run([sys.executable, "-m", *map(str, words)], check=False, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    place.with_name(f"{place.name}.log").write_text(outcome.stdout + outcome.stderr, encoding="utf-8")
    if outcome.returncode or not (place / "config.json").is_file():
        raise RuntimeError(f"{' '.join(map(str, words))} failed:\n{outcome.stdout[-2000:]}\n{outcome.stderr[-2000:]}")
    place.with_name(f"{place.name}.seconds").write_text(json.dumps(round(seconds, 1)))


def seconds_of(place: Path) -> float | None:
    """How long making a checkpoint took; None: it is not there."""
    note = place.with_name(f"{place.name}.seconds")
    return json.loads(note.read_text()) if note.is_file() else None


def widened(model: Path, place: Path) -> Path:
    """The same function of a LLaMA with more hidden channels, all zero, until 128 divides them, as exllamav3's gated MLPs need.

    Zeros lower the mean square that RMSNorm divides by; its weights and its epsilon make up for that. Rows and columns of zeros are
    what exllamav3 itself adds to layers that it pads. Returns where it lies, which is MODEL itself if 128 divides already.
    """
    config = json.loads((model / "config.json").read_text())
    hidden = config["hidden_size"]
    wide = -(-hidden // 128) * 128
    if wide == hidden:
        return model
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place, ignore=shutil.ignore_patterns("*.safetensors"))
    for path in model.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            missing = [wide - hidden if size == hidden and _is_hidden(name, axis) else 0 for axis, size in enumerate(tensor.shape)]
            if name.endswith("norm.weight"):
                tensor = tensor.float() * math.sqrt(hidden / wide)
            tensors[name] = torch.nn.functional.pad(tensor, [count for size in reversed(missing) for count in (0, size)])
        save_file(tensors, place / path.name, metadata={"format": "pt"})
    config["head_dim"] = config.get("head_dim") or hidden // config["num_attention_heads"]
    config |= {"hidden_size": wide, "rms_norm_eps": config["rms_norm_eps"] * hidden / wide}
    (place / "config.json").write_text(json.dumps(config, indent=1))
    return place


def _is_hidden(name: str, axis: int) -> bool:
    """Whether an axis of a LLaMA's tensor counts hidden channels; heads can be as many."""
    if ".o_proj." in name or ".down_proj." in name:
        return axis == 0
    return axis == 1 or name.endswith("norm.weight")


def exl3_text(model: Path) -> str:
    """The text that exllamav3 calibrates on by default, as its rows put it together, without those of random tokens."""
    from exllamav3 import Config, Tokenizer
    from exllamav3.conversion.calibration_data import get_default_calibration, random_data

    tokenizer = Tokenizer.from_config(Config.from_directory(str(model)))
    noise = {row.numpy().tobytes() for row in random_data(None, EXL3_ROWS, EXL3_COLUMNS, tokenizer)}
    rows = get_default_calibration({"cal_rows": EXL3_ROWS, "cal_cols": EXL3_COLUMNS}, tokenizer)
    written = [row[0].tolist() for row in rows if row.numpy().tobytes() not in noise]
    return "\n\n".join(loading.load_tokenizer(model).batch_decode(written, skip_special_tokens=True))


def judge(contender: Contender, place: Path, windows: Windows, reference: torch.nn.Module) -> dict[str, float | None]:
    """Put the dequantized weights into a copy of the reference and compare; the figures of `score_models`."""
    judged = copy.deepcopy(reference)
    weights = exl3_weights(place) if contender.family == "exl3" else septet_weights(place)
    count = 0
    for name, weight in weights:
        layer = judged.get_submodule(name)
        outputs, inputs = layer.weight.shape
        layer.weight = torch.nn.Parameter(weight[:outputs, :inputs].float().contiguous(), requires_grad=False)
        count += 1
    if count != len(linear_layers(reference)):
        raise RuntimeError(f"all {len(linear_layers(reference))} linear layers must be quantized, got {count} in {place}")
    return score_models(judged, windows, reference)


def septet_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights, float32 [N, K], of a septet directory."""
    for name, module in loading.load_model(directory, torch.float32).cuda().named_modules():
        if isinstance(module, SeptetLinear):
            yield name, module.dequantize()


def exl3_weights(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights, float16 [N, K] with padding, of an EXL3 directory, as exllamav3 itself reconstructs them."""
    from exllamav3.modules.quant import LinearEXL3

    for name, parts in exl3_tensors(directory).items():
        known = {part: tensor.cuda() for part, tensor in parts.items()}
        sizes = known["suh"].numel(), known["svh"].numel()
        yield name, LinearEXL3(None, *sizes, **known, out_dtype=torch.half, key=name).get_weight_tensor().T


def exl3_tensors(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each quantized layer of an EXL3 directory, by layer and by the last part of their names."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            keys = [key.rpartition(".") for key in file.keys()]
            quantized = {layer for layer, _, part in keys if part == "trellis"}
            for layer, _, part in keys:
                if layer in quantized:
                    layers.setdefault(layer, {})[part] = file.get_tensor(f"{layer}.{part}")
    return layers


def linear_layers(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Names and shapes (N, K) of the linear layers, the head apart."""
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}
    return {name: tuple(module.weight.shape) for name, module in linear.items()}


def described(contender: Contender, place: Path, shapes: dict[str, tuple[int, int]]) -> dict[str, object]:
    """What a result says about a checkpoint that does not depend on the judge."""
    calibration: object = {"tokens": contender.calibration or 16_384}
    note = "septet quantize --device cuda --head keep" + (f" --calibration: {_EXL3_TEXT}, without these" if contender.calibration else "")
    if contender.family == "exl3":
        calibration, note = {"tokens": EXL3_ROWS * EXL3_COLUMNS}, f"its own converter with -hb 16; {_EXL3_TEXT}"
        bits, stored = exl3_bits(place, shapes)
    else:
        bits = stored = checkpoint.inspect(place)["totals"]["effective_bits"]
    return {
        "title": contender.title + (f" ({stored:.2f} bits with padding)" if round(stored - bits, 2) else ""),
        "family": contender.family,
        "calibration": calibration,
        "activations": "float",
        "scope": BLOCKS_ONLY,
        "note": note,
        "effective_bits": bits,
        "stored_bits": stored,
    }


def exl3_bits(place: Path, shapes: dict[str, tuple[int, int]]) -> tuple[float, float]:
    """Bits per weight of an EXL3 directory: as if nothing had to be padded to multiples of 128, and as stored."""
    needed = stored = 0.0
    for name, parts in exl3_tensors(place).items():
        outputs, inputs = shapes[name]
        # 16 words of 16 bits for each bit of a tile of 256 weights; a scale for every input and every output.
        needed += parts["trellis"].shape[-1] / 16 * outputs * inputs + 16 * (outputs + inputs)
        stored += sum(8 * tensor.nbytes for tensor in parts.values())
    weights = sum(outputs * inputs for outputs, inputs in shapes.values())
    return needed / weights, stored / weights


def facts(arguments: argparse.Namespace, name: str) -> dict[str, object]:
    """Where and with what a result was made."""
    first, stop = arguments.text_bytes
    command = f"python benchmarks/exl3.py {arguments.model.resolve().name} --work DIR --only {name} --text-bytes {first}:{stop or ''}"
    found = machine_facts(ROOT, f"{command} --context {arguments.context}")
    found["versions"] |= {"exllamav3": importlib.metadata.version("exllamav3")}
    found["machine"] |= {"gpu": torch.cuda.get_device_name()}
    return found


if __name__ == "__main__":
    sys.exit(main())
