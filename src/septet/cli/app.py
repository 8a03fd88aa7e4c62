"""The application that the commands register with, and the one place where errors become messages.

An error is three lines on stderr (`error: ...`, an empty one, `hint: ...`) and exit code 1; wrong usage exits with 2. --debug,
before or after the command's name, shows the traceback too. Whatever a library raises is shown the same way, with its type.
"""

from __future__ import annotations

import errno
import os
import traceback
from types import TracebackType

import typer
from typer.core import TyperGroup

from septet.errors import SeptetError

__all__ = ["app", "main"]

UsageError = typer.BadParameter.__bases__[0]
# What typer itself turns into a message and an exit code.
HANDLED_BY_TYPER = (*UsageError.__mro__[: UsageError.__mro__.index(Exception)], typer.Exit, typer.Abort, BrokenPipeError)
DEBUG = "--debug"
COMMANDS = ("demo", "quantize", "run", "chat", "eval", "inspect", "verify", "bench", "info")


class _ErrorReport:
    """A context that turns any exception into a message on stderr and exit code 1."""

    def __init__(self, debug: bool) -> None:
        self._debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, HANDLED_BY_TYPER) or not isinstance(error, Exception | KeyboardInterrupt):
            return
        if self._debug:
            traceback.print_exception(kind, error, trace)
        if isinstance(error, KeyboardInterrupt):
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error
        message, hint = describe_error(error)
        typer.echo(f"error: {message}\n\nhint: {hint}", err=True)
        raise typer.Exit(1) from error


def describe_error(error: Exception) -> tuple[str, str]:
    """What to print for an exception: (message, hint)."""
    if isinstance(error, SeptetError):
        return f"{error.requirement}, got {error.got}", error.hint
    cause = f" (caused by {type(error.__cause__).__name__}: {error.__cause__})" if error.__cause__ else ""
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"{error}{cause}", "make room and run the command again; `septet quantize` goes on with --resume"
        return f"{error}{cause}", f"check the path and its permissions; {DEBUG} shows where it happened"
    if isinstance(error, MemoryError):
        return f"the memory of this machine must suffice, got {str(error) or 'no more'}{cause}", "use smaller sizes or a larger machine"
    return f"{type(error).__name__}: {error}{cause}", f"septet did not expect this: run again with {DEBUG} and report what it prints"


class _Group(TyperGroup):
    """The commands of septet, with errors reported."""

    def list_commands(self, ctx: typer.Context) -> list[str]:
        """The commands in the order of use."""
        return sorted(super().list_commands(ctx), key=COMMANDS.index)

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Accept --debug anywhere before `--`."""
        end = args.index("--") if "--" in args else len(args)
        given = DEBUG in args[:end]
        rest = [argument for argument in args[:end] if argument != DEBUG] + args[end:]
        return super().parse_args(ctx, [DEBUG, *rest] if given and rest else rest)

    def invoke(self, ctx: typer.Context) -> object:
        """Run the command."""
        with _ErrorReport(debug=bool(ctx.params.get("debug"))):
            return super().invoke(ctx)


app = typer.Typer(
    name="septet",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(show: bool) -> None:
    if show:
        from septet import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    debug: bool = typer.Option(False, DEBUG, help="Show a traceback when something goes wrong; may stand anywhere."),
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Print the version."),
) -> None:
    """Language models in 3.5 bits per weight: quantize, measure, run."""


def main() -> None:
    """Entry point of the command `septet`."""
    # OpenMP threads that spin while they wait make torch ten times slower on a busy machine; read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Those of numpy's BLAS spin for 2^26 clock ticks after each product and take a processor from the encoder; read when numpy is imported.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    app(prog_name="septet")
