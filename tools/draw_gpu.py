"""Write the tables of docs/gpu.md from benchmarks/results/gpu/*.csv.

python tools/draw_gpu.py            # rewrites the tables
python tools/draw_gpu.py --check    # exit 1 when the file would change
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "gpu.md"
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
START, END = "<!-- drawn by tools/draw_gpu.py -->\n", "<!-- end -->\n"
START_OF_MODELS = "<!-- whole models, drawn by tools/draw_gpu.py -->\n"
TITLES = {
    "bf16": "cuBLAS bf16",
    "septet-3.5": "**3.5 bits**",
    "septet-3.5-token": "3.5, one scale a token",
    "septet-3.5-float": "3.5, float activations",
    "septet-3.0": "3 bits",
    "septet-4.0": "4 bits",
    "torch-int4": "torch int4",
    "septet-3.5-triton": "3.5, Triton only",
}


def sources(rows: list[dict[str, str]]) -> list[str]:
    """A line for each run that rows come from: machine, versions, commit, command, and which tokens."""
    runs: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        tokens = runs.setdefault(tuple(row[key] for key in ("device", "torch", "cuda", "commit", "command")), [])
        if row["tokens"] not in tokens:
            tokens.append(row["tokens"])
    return [
        f"Tokens {', '.join(tokens)}: {device}, torch {torch}, CUDA {cuda}, commit {commit}: `{command}`."
        for (device, torch, cuda, commit, command), tokens in runs.items()
    ]


def rows_of(name: str) -> list[dict[str, str]]:
    """A result file."""
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def models() -> str:
    """Decoding speed of whole models."""
    rows = rows_of("models.csv")
    lines = ["| 8B-shaped Llama, head in bf16 | tokens a second | over the first | GB |", "|---|---:|---:|---:|"]
    lines += [f"| {row['name']} | {row['tokens_per_second']} | {row['of_bf16']} | {row['gb']} |" for row in rows]
    first = rows[0]
    versions = f"{first['device']}, torch {first['torch']}, transformers {first['transformers']}, commit {first['commit']}"
    return "\n".join([*lines, "", f"{versions}: `{first['command']}`.\n"])


def tables() -> str:
    """One table of times and one of energy."""
    rows = rows_of("h100.csv")
    found = {(int(row["tokens"]), int(row["k"]), int(row["n"]), row["name"]): row for row in rows}
    lines = ["| tokens | K x N | " + " | ".join(TITLES.values()) + " |", "|---:|---|" + "---:|" * len(TITLES)]
    for tokens, k, n in sorted({key[:3] for key in found}):
        cells = [found.get((tokens, k, n, name)) for name in TITLES]
        shown = ["-" if row is None else f"{float(row['us']):.1f} ({float(row['of_bf16']):.2f})" for row in cells]
        lines.append(f"| {tokens} | {k} x {n} | " + " | ".join(shown) + " |")
    energy = {row["name"]: row["mj"] for row in rows if row["mj"]}
    lines += ["", "Energy of one product, 8192 x 28672, one token, in mJ: "]
    lines[-1] += ", ".join(f"{title.strip('*')} {float(energy[name]):.0f}" for name, title in TITLES.items() if name in energy) + "."
    lines += ["", *sources(rows)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Rewrite or check; returns the exit status."""
    text = drawn = DOCUMENT.read_text()
    for start, content in ((START_OF_MODELS, models()), (START, tables())):
        before, _, rest = drawn.partition(start)
        drawn = before + start + content + END + rest.partition(END)[2]
    if sys.argv[1:] == ["--check"]:
        return int(drawn != text)
    DOCUMENT.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
