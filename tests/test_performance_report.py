"""docs/performance.md is what its rows say; ratios are those of one run, never of two."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tools")]

import draw_performance  # noqa: E402

FACTS = {"machine": "a small one", "instruction_set": "scalar", "versions": "septet 1", "commit": "abc", "command": "septet bench"}


def contender(engine: str, decode: float, prefill: float, **others: object) -> dict:
    """A row of `septet bench model --csv`."""
    speeds = {"decode_tok_per_s": decode, "prefill_tok_per_s": prefill, "decode_spread": 0.04, "prefill_spread": 0.125}
    what = {"model": "m", "engine": engine, "type": "t", "threads": 2, "prefill": 512, "decode": 128, "peak_rss_mb": 1234.5}
    return what | speeds | FACTS | others


def write(folder: Path, name: str, rows: list[dict]) -> None:
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def drawn(folder: Path, name: str) -> list[str]:
    """The lines between the markers."""
    text = draw_performance.redraw(f"a\n<!-- rows: {name} -->\nold\n<!-- end of rows -->\nb\n", folder)
    assert text.startswith(f"a\n<!-- rows: {name} -->\n") and text.endswith("<!-- end of rows -->\nb\n") and "old" not in text
    return text.splitlines()[2:-2]


def test_the_document_is_what_the_rows_say() -> None:
    outcome = subprocess.run([sys.executable, ROOT / "tools" / "draw_performance.py", "--check"], check=False)
    assert outcome.returncode == 0, "run: python tools/draw_performance.py"


def test_ratios_are_those_of_one_run(tmp_path: Path) -> None:
    other = {"command": "septet bench again"}
    rows = [contender("native", 30, 200), contender("llama.cpp", 20, 400)]
    rows += [contender("native", 50, 100, **other), contender("llama.cpp", 40, 50, **other)]
    write(tmp_path, "models", [*rows, contender("llama.cpp", 1, 1, threads=1)])
    lines = drawn(tmp_path, "models")
    assert lines[2] == "| m | native | t | 2 | 30 (128) | 4 % |  | 200 (512) | 12 % |  | 1,234 |"
    assert lines[3] == "| m | llama.cpp | t | 2 | 20 (128) | 4 % | 1.50 x | 400 (512) | 12 % | 0.50 x | 1,234 |"
    assert "| 1.25 x |" in lines[5] and "| 2.00 x |" in lines[5]
    assert " x |" not in lines[6]
    assert lines[-1] == "a small one; instruction set scalar; septet 1; commit abc."


def test_kernels_and_checks(tmp_path: Path) -> None:
    speeds = {"gweight_per_s": 43.21, "gb_per_s": 18.9, "bandwidth_gb_per_s": 20.5, "bandwidth_fraction": 0.923, "spread": 0.05}
    write(tmp_path, "kernels", [{"name": "product", "code": "trellis", "k": 8192, "n": 32768, "tokens": 1, "threads": 1} | speeds | FACTS])
    assert drawn(tmp_path, "kernels")[2] == "| product | trellis | 8192 x 32768 | 1 | 1 | 43.2 | 5 % | 18.9 | 20.5 | 92 % |"
    write(tmp_path, "checks", [{"check": "load", "model": "m", "threads": 2, "value": 0.61234, "unit": "s", "bound": "1"} | FACTS])
    assert drawn(tmp_path, "checks")[2] == "| load | m | 2 | 0.612 s | 1 |"


def test_without_rows(tmp_path: Path) -> None:
    assert drawn(tmp_path, "models") == ["No rows yet."]
