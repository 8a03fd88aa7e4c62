"""`septet bench kernels` and `septet bench model`: how fast, in interleaved rounds, beside what memory could give."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from septet.cli.app import app
from septet.cli.options import JsonOption, PackedArgument
from septet.cli.output import console, print_json, progress_bar
from septet.errors import OptionError

__all__ = ["bench"]

bench = typer.Typer(no_args_is_help=True, help="Measure speed.")
app.add_typer(bench, name="bench")

CsvOption = Annotated[Path | None, typer.Option(help="Append the rows to this CSV file, with machine, versions and commit.")]
RoundsOption = Annotated[int, typer.Option(help="How often everything is timed, in turns; medians are shown.")]
ThreadsOption = Annotated[str, typer.Option(help="Numbers of threads, separated by commas; 0: the default.")]


@bench.command()
def kernels(
    sizes: Annotated[str, typer.Option(help="Inputs x outputs, separated by commas.")] = "8192x32768,4096x65536",
    codes: Annotated[str, typer.Option(help="Of trellis, trellis-3, trellis-4, split, int8.")] = "trellis,split",
    tokens: Annotated[str, typer.Option(help="Tokens at once, separated by commas.")] = "1",
    threads: ThreadsOption = "0",
    backends: Annotated[str, typer.Option(help="They take turns: native, fortran, or builds: native-avx2, fortran-flang.")] = "native",
    rounds: RoundsOption = 5,
    csv: CsvOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time products with random weights beside reading the same memory."""
    from septet.bench.kernels import KernelCase, measure_kernels

    cases = [
        KernelCase(code, *size, count, workers)
        for code in codes.split(",")
        for size in map(_size, sizes.split(","))
        for count in _numbers(tokens, "tokens")
        for workers in _threads(threads)
    ]
    with progress_bar() as bar:
        task = bar.add_task("time kernels", total=len(cases))
        rows = measure_kernels(cases, rounds, lambda done, total: bar.update(task, completed=done), backends.split(","))
    columns = "name code backend k n tokens threads gweight_per_s gb_per_s bandwidth_fraction of_first spread"
    _show(rows, tuple(columns.split()), csv, as_json)


@bench.command()
def model(
    directory: PackedArgument,
    against: Annotated[
        list[str] | None, typer.Option(help="A .gguf file, or `llama.cpp`: files of the sizes of DIR with random weights. May be repeated.")
    ] = None,
    types: Annotated[str, typer.Option(help="What `--against llama.cpp` makes, separated by commas.")] = "Q4_0,Q4_K",
    gguf_folder: Annotated[Path | None, typer.Option(help="Where these files are kept for another time; else they go at the end.")] = None,
    engines: Annotated[str, typer.Option(help="For DIR, of native and transformers.")] = "native,transformers",
    threads: ThreadsOption = "0",
    prefill: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 512,
    decode: Annotated[int, typer.Option(help="Tokens one after the other.")] = 128,
    rounds: RoundsOption = 5,
    csv: CsvOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time a model's prompts and single tokens, each contender in a process of its own."""
    from septet.bench.models import Contender, measure_models

    own = [Contender(directory, engine, workers) for workers in _threads(threads) for engine in engines.split(",")]
    with _files_of(directory, against or [], types.split(","), gguf_folder) as files:
        contenders = []
        for workers in _threads(threads):
            contenders += [contender for contender in own if contender.threads == workers]
            contenders += [Contender(file, "llama.cpp", workers) for file in files]
        with progress_bar() as bar:
            task = bar.add_task("time models", total=rounds * len(contenders))
            rows = measure_models(contenders, prefill, decode, rounds, lambda done, total: bar.update(task, completed=done))
    figures = ("prefill_tok_per_s", "decode_tok_per_s", "peak_rss_mb", "prefill_spread", "decode_spread", "load_seconds")
    _show(rows, ("model", "engine", "type", "threads", *figures), csv, as_json)


@contextmanager
def _files_of(directory: Path, against: list[str], types: list[str], folder: Path | None) -> Iterator[list[Path]]:
    """The .gguf files to time; those made for this occasion are there as long as the context."""
    from septet.bench.gguf_files import files_like

    with ExitStack() as stack:
        files = []
        for word in against:
            if word != "llama.cpp":
                files.append(Path(word))
                continue
            if folder is None:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="septet-bench-")))
            folder.mkdir(parents=True, exist_ok=True)
            files += files_like(directory, folder, types)
        yield files


def _show(rows: list[dict], names: tuple[str, ...], csv: Path | None, as_json: bool) -> None:
    if csv is not None:
        from septet.bench.provenance import append_rows, provenance

        facts = provenance("septet", *sys.argv[1:])
        append_rows(csv, [row | facts for row in rows])
    if as_json:
        print_json({"rows": rows})
        return
    from rich.table import Table

    table = Table(*(name.replace("_", " ").replace(" per s", "/s") for name in names))
    for row in rows:
        table.add_row(*(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in names))
    console().print(table)


def _numbers(text: str, name: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise OptionError(f"{name} must be numbers separated by commas", text, "for example 1,2")
    return [int(part) for part in parts]


def _threads(text: str) -> list[int]:
    from septet.quantize.threads import default_threads

    return [count or default_threads() for count in _numbers(text, "threads")]


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise OptionError("a size must be inputs x outputs", text, "for example 8192x32768")
    return int(parts[0]), int(parts[1])
