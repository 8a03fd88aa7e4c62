"""`septet inspect`: every quantized layer with its bits, bytes and error, and the totals."""

from __future__ import annotations

from septet.cli.app import app
from septet.cli.options import JsonOption, PackedArgument
from septet.cli.output import console, print_json

__all__ = ["inspect"]

PARTS = ("linear", "head", "embedding", "other", "total_without_embeddings", "total")


@app.command()
def inspect(directory: PackedArgument, as_json: JsonOption = False) -> None:
    """List the layers of a septet directory: code, bits on disk, bytes, error."""
    from septet import checkpoint

    found = checkpoint.inspect(directory)
    if as_json:
        print_json(found)
        return
    from rich.table import Table

    layers = Table("layer", "code", box=None)
    for heading in ("out x in", "bits", "effective", "bytes", "relative error"):
        layers.add_column(heading, justify="right")
    for row in found["tensors"]:
        error = "" if row["relative_error"] is None else f"{row['relative_error']:.4f}"
        shape = " x ".join(str(size) for size in row["shape"])
        layers.add_row(row["name"], row["code"], shape, f"{row['bits']:g}", f"{row['effective_bits']:.4f}", f"{row['size_bytes']:,}", error)
    totals = Table("total of", box=None)
    for heading in ("weights", "bytes", "effective bits"):
        totals.add_column(heading, justify="right")
    for part in PARTS:
        weights, size = found["totals"][f"weights_{part}"], found["totals"][f"size_bytes_{part}"]
        if weights:
            totals.add_row(part.replace("_", " "), f"{weights:,}", f"{size:,}", f"{8 * size / weights:.4f}")
    console().print(layers, "", totals, sep="\n")
