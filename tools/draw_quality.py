"""Fill docs/quality.md from the result files: every table between its markers, and the plots beside it.

    python tools/draw_quality.py            # rewrites them
    python tools/draw_quality.py --check    # exit 1 when a file would change

A table NAME stands between "<!-- results: NAME -->" and "<!-- end of results -->" and has a row for each result that names it.
What a result file holds: benchmarks/results/README.md.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from quality_plot import draw_plot

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality"
DOCUMENT = ROOT / "docs" / "quality.md"
SCHEMA = 1
#: Tables that are plotted, and where.
PLOTS = {"comparison": ROOT / "docs" / "quality.svg", "dithered": ROOT / "docs" / "quality-dithered.svg"}
#: In these tables rows keep the order that the results ask for; all others are sorted by bits.
ORDERED = ("ladder", "efforts", "seeds")
REQUIRED = {
    *("schema", "name", "title", "family", "tables", "protocol", "activations", "effective_bits", "tokens", "windows", "seconds"),
    *("kld_mean", "kld_stderr", "kld_p99", "top1_agreement", "perplexity", "perplexity_stderr", "reference_perplexity"),
}
MARKED = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
COLUMNS = ("recipe", "bits", "KL, nats", "KL, 99th percentile", "top-1, %", "perplexity", "activations", "made in, s")
HEADING = f"| {' | '.join(COLUMNS)} |\n|---|---:|---:|---:|---:|---:|---|---:|\n"


def load_results(folder: Path) -> list[dict]:
    """Every result of a folder, by name.

    Raises:
        ValueError: a file lacks a field, or follows another schema.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        missing = sorted(REQUIRED - result.keys())
        if missing or result["schema"] != SCHEMA:
            raise ValueError(f"{path.name} must follow schema {SCHEMA}, it lacks {', '.join(missing) or 'nothing but follows another'}")
        results.append(result)
    return results


def rows_of(results: list[dict], name: str) -> list[dict]:
    """The results of a table in their order.

    Raises:
        ValueError: they were judged on different texts or models.
    """
    chosen = [result for result in results if name in result["tables"]]
    protocols = {json.dumps(result["protocol"], sort_keys=True) for result in chosen}
    if len(protocols) > 1:
        names = ", ".join(result["name"] for result in chosen)
        raise ValueError(f"all results of the table {name} must have one protocol, got {len(protocols)} in {names}")
    if name in ORDERED:
        return sorted(chosen, key=lambda result: (result.get("order", 0), result["name"]))
    return sorted(chosen, key=lambda result: (round(result["effective_bits"], 2), result["kld_mean"]))


def table(results: list[dict], name: str) -> str:
    """A table in Markdown, and what its figures were measured on."""
    chosen = rows_of(results, name)
    if not chosen:
        return "No results yet.\n"
    first = chosen[0]
    protocol, text = first["protocol"], first["protocol"]["text"]
    source = f"{protocol['model']}; {text['file']}, bytes {text['bytes'][0]:,} to {text['bytes'][1]:,}"
    windows = f"{first['windows']} windows of {protocol['context']} tokens, {first['tokens']:,} tokens scored"
    measured = f"\n{source}: {windows}; perplexity of the reference {first['reference_perplexity']:.2f}.\n"
    return HEADING + "".join(map(row, chosen)) + measured


def row(result: dict) -> str:
    """One line of a table."""
    made = result["seconds"]["quantize"]
    cells = [
        result["title"],
        f"{result['effective_bits']:.3f}",
        f"{result['kld_mean']:.4f} ± {result['kld_stderr']:.4f}",
        f"{result['kld_p99']:.2f}",
        f"{100 * result['top1_agreement']:.1f}",
        f"{result['perplexity']:.2f} ± {result['perplexity_stderr']:.2f}",
        result["activations"],
        "" if made is None else f"{made:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def redraw(document: str, results: list[dict]) -> str:
    """A document with all its tables drawn anew."""
    return MARKED.sub(lambda found: found[1] + table(results, found[2]) + found[3], document)


def main() -> int:
    """Rewrite or check; returns the exit status."""
    results = load_results(RESULTS)
    drawn = {DOCUMENT: redraw(DOCUMENT.read_text(), results)}
    drawn |= {path: draw_plot(rows_of(results, name)) for name, path in PLOTS.items()}
    if sys.argv[1:] == ["--check"]:
        return int(any(not path.exists() or path.read_text() != text for path, text in drawn.items()))
    for path, text in drawn.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
