"""Where things go: data to stdout, all else to stderr; and how they look. rich obeys NO_COLOR by itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

__all__ = ["console", "note", "print_json", "progress_bar", "quiet_libraries"]

# rich takes 80 columns when nobody looks, which would break the tables in a log.
WIDTH_WITHOUT_TERMINAL = 120


def console(stderr: bool = False) -> Console:
    """A rich console on stdout or stderr."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, width=WIDTH_WITHOUT_TERMINAL)


def note(text: str) -> None:
    """A line for the reader, on stderr."""
    typer.echo(text, err=True)


def print_json(value: dict) -> None:
    """Print exactly one JSON object on stdout. Infinity and NaN, which JSON lacks, become null."""
    typer.echo(json.dumps(_finite(value), indent=2))


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value


def progress_bar() -> Progress:
    """A progress bar with elapsed and estimated time on stderr; a context manager."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    return Progress(TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), *times, console=console(stderr=True))


def quiet_libraries() -> None:
    """Keep transformers' own bars and hints off the terminal; errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
