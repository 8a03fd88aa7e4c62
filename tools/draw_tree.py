"""Draw the tree in ARCHITECTURE.md: every source file with the first line it says about itself.

python tools/draw_tree.py            # rewrites the tree in ARCHITECTURE.md
python tools/draw_tree.py --check    # exit 1 when the file would change
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "ARCHITECTURE.md"
FOLDERS = ("include", "native", "src/septet", "tests", "tools", "benchmarks", "examples")
SUFFIXES = {".py", ".sh", ".h", ".cpp", ".cu", ".f90"}
START, END = "```tree\n", "```\n"
COLUMN = 38


def idea(path: Path) -> str:
    """The first line of a file's docstring or opening comment, without its full stop."""
    text = path.read_text()
    if path.suffix == ".py":
        line = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    else:
        opening = re.match(r"(?:#!.*\n)?(?://+|# |! |/\*+)\s*(.*)", text)
        line = opening.group(1) if opening else f"What {path.stem}.h declares"
    return line.rstrip(".:")


def draw(folder: Path, depth: int = 0) -> list[str]:
    """One line per source file below `folder`, files before folders; the folder's own line says what its __init__.py says."""
    entries = sorted(path for path in folder.iterdir() if path.name != "__pycache__")
    files = [path for path in entries if path.suffix in SUFFIXES and path.name != "__init__.py"]
    inner = [line for path in files for line in [entry(path.name, idea(path), depth + 1)]]
    inner += [line for path in entries if path.is_dir() for line in draw(path, depth + 1)]
    name = folder.relative_to(ROOT).as_posix() if depth == 0 else folder.name
    start = folder / "__init__.py"
    return [entry(f"{name}/", idea(start) if start.exists() else "", depth), *inner] if inner else []


def entry(name: str, text: str, depth: int) -> str:
    """A line of the tree."""
    return f"{'  ' * depth + name:{COLUMN}}{text}".rstrip()


def redraw(text: str) -> str:
    """`text` with its tree drawn anew."""
    before, _, rest = text.partition(START)
    tree = [line for folder in FOLDERS if (ROOT / folder).is_dir() for line in draw(ROOT / folder)]
    return before + START + "\n".join(tree) + "\n" + END + rest.partition(END)[2]


def main() -> int:
    """Rewrite or check; returns the exit status."""
    text = DOCUMENT.read_text()
    drawn = redraw(text)
    if sys.argv[1:] == ["--check"]:
        return int(drawn != text)
    DOCUMENT.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
