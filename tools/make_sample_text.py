"""Make src/septet/data/sample.txt, the English text that the demo and the tests measure on.

Three free sources (src/septet/data/README.md says why they are free) are cut, their lines joined to paragraphs, and laid
down in two halves of the same mixture: proceedings, essays, a story. Whoever calibrates on the first half can evaluate
on the second. The same sources give the same bytes:

    python tools/make_sample_text.py lcet10.txt jargon.txt alice29.txt src/septet/data/sample.txt
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

SOURCES = ("proceedings", "essays", "story")
# Line numbers of each source, from 1; the last one is not taken. Front matter, programmes and address lists stay outside.
HALVES = (
    {"proceedings": [(145, 3027)], "essays": [(275, 375), (388, 466), (1186, 1494)], "story": [(14, 1675)]},
    {"proceedings": [(3027, 5866)], "essays": [(1494, 1781)], "story": [(1675, 3597)]},
)
STRAIGHT_QUOTES = str.maketrans({"‘": "'", "’": "'", "`": "'", "“": '"', "”": '"'})


def sections(lines: list[str], spans: list[tuple[int, int]]) -> list[str]:
    """Cut the line ranges `spans` out of `lines`, without rows of stars and boxed keyword lists (between rows of plus signs)."""
    kept, in_box = [], False
    for line in (line for first, last in spans for line in lines[first - 1 : last - 1]):
        if line.startswith("+++"):
            in_box = not in_box
        elif not in_box and not re.fullmatch(r"[\s*]*\*[\s*]*", line):
            kept.append(line)
    return kept


def paragraphs(lines: list[str]) -> list[str]:
    """Join the lines of every paragraph; a line with a bullet starts a new one. Words split at a line's end become whole."""
    found = []
    for block in re.split(r"\n\s*\n", "\n".join(lines)):
        for piece in re.split(r"\n(?=\s*\* )", block):
            text = re.sub(r"(\w-)\s*\n\s*(?=[a-z])", r"\1", piece)
            found.append(" ".join(text.translate(STRAIGHT_QUOTES).split()))
    return [text for text in found if text]


def main(sources: list[Path], out: Path) -> None:
    """Write `out` and print where its second half begins, its size and its SHA-256."""
    lines = {name: path.read_text("utf-8").splitlines() for name, path in zip(SOURCES, sources, strict=True)}
    halves = ["\n\n".join(text for name in SOURCES for text in paragraphs(sections(lines[name], half[name]))) for half in HALVES]
    data = ("\n\n".join(halves) + "\n").encode()
    out.write_bytes(data)
    print(f"{len(data)} bytes, second half from byte {len(halves[0].encode()) + 2}, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:4]], Path(sys.argv[4]))
