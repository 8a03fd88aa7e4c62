"""Make models with random weights in the sizes of real ones, for septet and for llama.cpp: for speed only, their text is noise.

    python benchmarks/make_synthetic.py 1b OUT --head trellis --head int8 --gguf Q4_0 --gguf Q4_K --gguf Q4_K_M

writes OUT/1b-trellis and OUT/1b-int8 (septet directories), OUT/1b-Q4_0.gguf and so on. A GGUF type with _M or _mix has llama.cpp's default
mix (Q6_K head and more), any other is the same type everywhere (`--pure`). What is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from septet.bench.gguf_files import write_random_gguf
from septet.bench.synthetic import HEADS, SHAPES, write_synthetic
from septet.engine.shape import read_shape

__all__ = ["main"]


def main() -> int:
    """Write the models; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--head", action="append", choices=HEADS, default=[], help="of a septet directory; may be repeated")
    parser.add_argument("--gguf", action="append", default=[], metavar="TYPE", help="may be repeated; needs a septet directory")
    arguments = parser.parse_args()
    for head in arguments.head or ["int8"]:
        directory = arguments.out / f"{arguments.size}-{head}"
        if not directory.exists():
            write_synthetic(SHAPES[arguments.size], directory, head)
        print(directory)
    shape = read_shape(json.loads((directory / "config.json").read_text()))
    for name in arguments.gguf:
        path = arguments.out / f"{arguments.size}-{name}.gguf"
        kind = name.removesuffix("_M").removesuffix("_mix")
        if not path.exists():
            partial = path.with_suffix(".partial")
            write_random_gguf(shape, partial, kind, pure=kind == name)
            partial.rename(path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
