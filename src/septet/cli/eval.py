"""`septet eval`: perplexity on a text, and the divergence from a reference model."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from septet.cli.app import app
from septet.cli.options import ActivationOption, JsonOption, ModelArgument
from septet.cli.output import console, print_json, progress_bar, quiet_libraries
from septet.errors import OptionError

if TYPE_CHECKING:
    from septet.evaluation import EvaluationResult

__all__ = ["eval", "read_text"]


class Score(str, Enum):
    """Which positions of a window count."""

    half = "half"
    all = "all"


@app.command()
def eval(
    directory: ModelArgument,
    text: Annotated[Path, typer.Option(help="UTF-8 text to predict.")],
    reference: Annotated[Path | None, typer.Option(help="The original model, to compare predictions with.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 512,
    score: Annotated[Score, typer.Option(help="The second half of each window, as llama.cpp does, or all of it.")] = Score.half,
    activations: ActivationOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what a model predicts, against a text and against its original."""
    from septet.evaluation import evaluate

    quiet_libraries()
    content = read_text(text)
    with progress_bar() as bar:
        task = bar.add_task("evaluate", total=None)
        result = evaluate(
            directory,
            content,
            reference,
            context,
            score.value,
            activations and activations.value,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(result.as_dict())
    else:
        _print(result)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        OptionError: it is not there, or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise OptionError("the text must be a readable file", f"{error.strerror}: {path}", "check the path") from error
    except UnicodeDecodeError as error:
        raise OptionError("the text must be UTF-8", f"{error.reason} at byte {error.start} of {path}", "convert it") from error


def _print(result: EvaluationResult) -> None:
    from rich.table import Table

    table = Table("figure", "value", show_header=False, box=None)
    rows = {"perplexity": f"{result.perplexity:.4f} ± {result.perplexity_stderr:.4f}"}
    if result.kld_mean is not None:
        rows |= {
            "perplexity of the reference": f"{result.reference_perplexity:.4f}",
            "KL divergence, nats": f"{result.kld_mean:.5f} ± {result.kld_stderr:.5f}",
            "KL divergence, 99th percentile": f"{result.kld_p99:.4f}",
            "top-1 agreement": f"{100 * result.top1_agreement:.2f} %",
        }
    if result.effective_bits is not None:
        rows["effective bits, linear layers"] = f"{result.effective_bits:.4f}"
    if result.effective_bits_total is not None:
        rows["effective bits, everything"] = f"{result.effective_bits_total:.4f}"
    part = "second half" if result.score == "half" else "all"
    start = ", each starting with BOS" if result.starts_with_bos else ""
    rows["scored tokens"] = f"{result.tokens:,} ({part} of {result.windows} windows of {result.context}{start})"
    rows["seconds"] = f"{result.seconds:.1f} ({result.compute})"
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)
