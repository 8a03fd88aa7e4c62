"""Fill docs/performance.md from the CSV rows in benchmarks/results/cpu: every table between its markers, ratios computed here.

    python tools/draw_performance.py            # rewrites it
    python tools/draw_performance.py --check    # exit 1 when it would change

A table NAME stands between "<!-- rows: NAME -->" and "<!-- end of rows -->". Rows come from `septet bench ... --csv` and
`benchmarks/engine_checks.py --csv`; the line under a table says on which machine, at which commit, with which versions.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
DOCUMENT = ROOT / "docs" / "performance.md"
MARKED = re.compile(r"(<!-- rows: (\S+) -->\n).*?(<!-- end of rows -->)", re.DOTALL)
#: Rows of one run of `septet bench` share all of these, and only such rows are compared.
RUN = ("command", "commit", "machine", "versions", "threads")
Row = dict[str, str]


def load_rows(path: Path) -> list[Row]:
    """The rows of a CSV file; none when it is not there."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figure(row: Row, name: str, digits: int = 3) -> str:
    """A number with as many significant digits, never in exponents."""
    value = float(row[name])
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def percent(row: Row, name: str) -> str:
    """A share in percent."""
    return f"{100 * float(row[name]):.0f} %"


def kernels(rows: Sequence[Row]) -> str:
    """One line per product; the fraction is the median over rounds, each beside a plain sum over the same memory."""
    names = ("product", "code", "inputs x outputs", "tokens", "threads", "Gweight/s", "spread", "GB/s", "memory, GB/s", "of memory")
    lines = heading(names, 3)
    for row in rows:
        cells = (
            row["name"], row["code"], f"{row['k']} x {row['n']}", row["tokens"], row["threads"], figure(row, "gweight_per_s"),
            percent(row, "spread"), figure(row, "gb_per_s"), figure(row, "bandwidth_gb_per_s"), percent(row, "bandwidth_fraction"),
        )  # fmt: skip
        lines += line(cells)
    return lines + origin(rows)


def models(rows: Sequence[Row]) -> str:
    """One line per contender, the runs in their order; ratios are septet's speed over this contender's in the same run."""
    speeds = ("decode, tok/s", "spread", "septet is", "prefill, tok/s", "spread", "septet is")
    lines = heading(("model", "engine", "weights", "threads", *speeds, "peak MB"), 3)
    own: dict[tuple[str, ...], Row] = {}
    for row in rows:
        run = tuple(row[name] for name in RUN)
        if row["engine"] == "native":
            own[run] = row
        cells = [row["model"], row["engine"], row["type"], row["threads"]]
        for name in ("decode", "prefill"):
            cells += [f"{figure(row, f'{name}_tok_per_s')} ({row[name]})", percent(row, f"{name}_spread")]
            cells.append(ratio(own.get(run), row, f"{name}_tok_per_s"))
        lines += line((*cells, f"{float(row['peak_rss_mb']):,.0f}"))
    return lines + origin(rows)


def ratio(own: Row | None, row: Row, name: str) -> str:
    """How many times as fast septet is; nothing beside itself."""
    return "" if own is None or own is row else f"{float(own[name]) / float(row[name]):.2f} x"


def checks(rows: Sequence[Row]) -> str:
    """One line per promise."""
    lines = heading(("", "model", "threads", "measured", "bound"), 3)
    for row in rows:
        lines += line((row["check"], row["model"], row["threads"], f"{figure(row, 'value')} {row['unit']}", row["bound"]))
    return lines + origin(rows)


def heading(names: Sequence[str], words: int) -> str:
    """The first two lines of a table; all but its first columns hold numbers."""
    return line(names) + "|" + "---|" * words + "---:|" * (len(names) - words) + "\n"


def line(cells: Sequence[str]) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |\n"


def origin(rows: Sequence[Row]) -> str:
    """What the rows of a table share, or differ in."""
    parts = []
    for name, words in (("machine", ""), ("instruction_set", "instruction set "), ("versions", ""), ("commit", "commit ")):
        parts.append(words + ", ".join(dict.fromkeys(row[name] for row in rows if row[name])))
    return f"\n{'; '.join(part for part in parts if part)}.\n"


TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "kernels": kernels, "kernels_xeon": kernels, "models": models, "avx2": models, "checks": checks
}  # fmt: skip


def redraw(document: str, folder: Path) -> str:
    """A document with all its tables drawn anew."""

    def table(found: re.Match[str]) -> str:
        rows = load_rows(folder / f"{found[2]}.csv")
        return found[1] + (TABLES[found[2]](rows) if rows else "No rows yet.\n") + found[3]

    return MARKED.sub(table, document)


def main() -> int:
    """Rewrite or check; returns the exit status."""
    before = DOCUMENT.read_text()
    drawn = redraw(before, RESULTS)
    if sys.argv[1:] == ["--check"]:
        return int(drawn != before)
    DOCUMENT.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
