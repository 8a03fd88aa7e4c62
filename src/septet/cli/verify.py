"""`septet verify`: is every file, header, tensor and layer what the checkpoint says it is?"""

from __future__ import annotations

import typer

from septet.cli.app import app
from septet.cli.options import JsonOption, PackedArgument
from septet.cli.output import note, print_json

__all__ = ["verify"]


@app.command()
def verify(directory: PackedArgument, as_json: JsonOption = False) -> None:
    """Compare a septet directory with its checksums."""
    from septet import checkpoint

    report = checkpoint.verify(directory)
    counts = {"files": report.files, "tensors": report.tensors, "layers": report.layers}
    if as_json:
        problems = [{"requirement": error.requirement, "got": str(error.got), "hint": error.hint} for error in report.problems]
        print_json({"intact": not problems, **counts, "problems": problems})
    elif not report.problems:
        typer.echo("intact: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    if report.problems:
        *others, last = report.problems
        for error in others:
            note(f"error: {error.requirement}, got {error.got}\n\nhint: {error.hint}\n")
        raise last
