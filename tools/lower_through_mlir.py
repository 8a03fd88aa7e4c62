"""Take the split product from Fortran, and from memrefs, through MLIR level by level; check every result bit for bit.

    python tools/lower_through_mlir.py [FOLDER]       # artefacts into FOLDER (build/mlir), figures into docs/mlir.md and docs/mlir.json
    python tools/lower_through_mlir.py FOLDER --dry   # artefacts and checks only

Needs flang-22, mlir-22-tools and clang-22. Each step is one command of one tool; the last of them make shared libraries, whose results
are compared with `septet.kernels.reference`. Graphics cards get PTX, which is as far as these tools go without a driver.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from septet.kernels import reference

ROOT = Path(__file__).resolve().parent.parent
FORTRAN = ROOT / "native" / "mlir" / "split_product.f90"
MEMREFS = ROOT / "native" / "mlir" / "split_product.mlir"
DOCUMENT, FIGURES = ROOT / "docs" / "mlir.md", ROOT / "docs" / "mlir.json"
TOOLS = ("flang-22", "fir-opt-22", "tco-22", "mlir-opt-22", "mlir-translate-22", "clang-22")
START, END = "<!-- figures: tools/lower_through_mlir.py -->\n", "<!-- end of figures -->\n"

#: One processor for all figures, so that they do not depend on where they were made.
CODE = ["-O3", "-march=x86-64-v3", "-ffp-contract=off", "-fPIC", "-Wno-override-module", "-x", "ir"]
TO_LLVM = [f"--{step}" for step in (
    "convert-scf-to-cf", "convert-arith-to-llvm", "finalize-memref-to-llvm", "convert-func-to-llvm", "convert-cf-to-llvm",
    "convert-index-to-llvm", "reconcile-unrealized-casts",
)]  # fmt: skip
TO_LAUNCHES = [f"--{step}" for step in (
    "convert-linalg-to-parallel-loops", "scf-parallel-loop-tiling=parallel-loop-tile-sizes=1,64", "canonicalize", "cse",
    "gpu-map-parallel-loops", "convert-parallel-loops-to-gpu", "expand-strided-metadata", "lower-affine", "canonicalize", "cse",
    "gpu-kernel-outlining",
)]  # fmt: skip
TO_PTX = (
    "builtin.module(nvvm-attach-target{chip=sm_80 features=+ptx70 O=3},"
    "gpu.module(convert-scf-to-cf,convert-gpu-to-nvvm,reconcile-unrealized-casts),gpu-module-to-binary{format=isa})"
)


@dataclass(frozen=True)
class Step:
    """One command: what comes out, its file, and the program with its arguments ({in} and {out} are files)."""

    level: str
    file: str
    source: str
    command: list[str]


STEPS = [
    Step("HLFIR", "hlfir.mlir", "", ["flang-22", "-fc1", "-O2", "-ffp-contract=off", "-emit-hlfir", str(FORTRAN), "-o", "{out}"]),
    Step("FIR", "fir.mlir", "hlfir.mlir", ["fir-opt-22", "--convert-hlfir-to-fir", "--simplify-fir-operations", "--canonicalize", "--cse",
                                           "{in}", "-o", "{out}"]),
    Step("scf.parallel", "scf.mlir", "fir.mlir", ["fir-opt-22", "--fir-to-scf=parallel-unordered=true", "{in}", "-o", "{out}"]),
    Step("LLVM dialect", "llvm.mlir", "scf.mlir", ["tco-22", "--emit-final-mlir", "{in}", "-o", "{out}"]),
    Step("LLVM IR", "fortran.ll", "llvm.mlir", ["mlir-translate-22", "--mlir-to-llvmir", "--allow-unregistered-dialect", "{in}",
                                                "-o", "{out}"]),
    Step("object", "fortran.o", "fortran.ll", ["clang-22", *CODE, "-c", "{in}", "-o", "{out}"]),
    Step("library", "fortran.so", "fortran.o", ["clang-22", "-shared", "{in}", "-o", "{out}"]),
    # Shorter ways to the same result, to see that no level changed it.
    Step("LLVM IR from FIR", "fir.ll", "fir.mlir", ["tco-22", "{in}", "-o", "{out}"]),
    Step("library from FIR", "fir.so", "fir.ll", ["clang-22", *CODE, "-shared", "{in}", "-o", "{out}"]),
    Step("library by flang alone", "flang.so", "", ["flang-22", "-O3", "-march=x86-64-v3", "-ffp-contract=off", "-fPIC", "-shared",
                                                    str(FORTRAN), "-o", "{out}"]),
    Step("memrefs: parallel loops", "loops.mlir", "", ["mlir-opt-22", "--convert-linalg-to-parallel-loops", "--expand-strided-metadata",
                                                       "--lower-affine", "--canonicalize", "--cse", str(MEMREFS), "-o", "{out}"]),
    Step("memrefs: LLVM dialect", "memrefs.mlir", "loops.mlir", ["mlir-opt-22", *TO_LLVM, "{in}", "-o", "{out}"]),
    Step("memrefs: LLVM IR", "memrefs.ll", "memrefs.mlir", ["mlir-translate-22", "--mlir-to-llvmir", "{in}", "-o", "{out}"]),
    Step("memrefs: library", "memrefs.so", "memrefs.ll", ["clang-22", *CODE, "-shared", "{in}", "-o", "{out}"]),
    Step("memrefs: GPU kernels", "gpu.mlir", "", ["mlir-opt-22", *TO_LAUNCHES, str(MEMREFS), "-o", "{out}"]),
    Step("memrefs: PTX in a module", "binary.mlir", "gpu.mlir", ["mlir-opt-22", f"--pass-pipeline={TO_PTX}", "{in}", "-o", "{out}"]),
]  # fmt: skip


def missing_tools() -> list[str]:
    """The programs that are not installed."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def lower(folder: Path) -> None:
    """Run every step; SystemExit with the tool's words when one fails."""
    for step in STEPS:
        places = {"{in}": str(folder / step.source), "{out}": str(folder / step.file)}
        done = subprocess.run([places.get(word, word) for word in step.command], capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: {step.command[0]} must make {step.level}, got {done.stderr.strip()}\nhint: see native/mlir")
    (folder / "kernels.ptx").write_text("\n".join(ptx_of((folder / "binary.mlir").read_text())))


def ptx_of(module: str) -> list[str]:
    """The texts of all GPU binaries in a module."""
    escaped = re.findall(r'assembly = "((?:[^"\\]|\\.)*)"', module)
    return [re.sub(r"\\([0-9A-F]{2})", lambda match: chr(int(match[1], 16)), text) for text in escaped]


def operations(path: Path) -> dict[str, int]:
    """How many operations of each dialect a file has; of LLVM IR, PTX and machine code, how many instructions."""
    text = path.read_text(errors="replace") if path.suffix in {".mlir", ".ll", ".ptx"} else ""
    if path.suffix == ".mlir":
        names = re.findall(r"^\s*(?:%[^=]*= )?\"?([a-z_]+)\.[a-z_.]+", text, flags=re.MULTILINE)
        return dict(sorted(Counter(names).items()))
    if path.suffix == ".ll":
        return {"instructions": len(re.findall(r"^  (?:%[^=]+ = )?[a-z]", text, flags=re.MULTILINE))}
    if path.suffix == ".ptx":
        return {"instructions": len(re.findall(r"^\s+(?:@\S+ )?[a-z][\w.]*\s[^:\n]*;", text, flags=re.MULTILINE))}
    return {}


class Memref(ctypes.Structure):
    """The descriptor of an array with three axes at most, as MLIR's C interface takes it."""

    _fields_ = [("allocated", ctypes.c_void_p), ("aligned", ctypes.c_void_p), ("numbers", ctypes.c_int64 * 7)]

    def __init__(self, array: np.ndarray) -> None:
        strides = [stride // array.itemsize for stride in array.strides]
        super().__init__(array.ctypes.data, array.ctypes.data, (ctypes.c_int64 * 7)(0, *array.shape, *strides))


def product(library: Path, operands: tuple[np.ndarray, ...]) -> np.ndarray:
    """What a library makes of (packed, x, step, offset, scale)."""
    packed, x, step, offset, scale = operands
    y = np.full((len(x), len(step)), np.nan, np.float32)
    handle = ctypes.CDLL(str(library))
    if library.name == "memrefs.so":
        rows, tiles, sums = len(packed), x.shape[1] // 4, np.zeros((len(x), 2), np.int32)
        arrays = packed.reshape(rows, tiles, 112), x.reshape(len(x), tiles, 4), step, offset, scale, sums, y
        handle._mlir_ciface_split_product(*(ctypes.byref(Memref(array)) for array in arrays))
    else:
        sizes = x.shape[1] // 4, len(step), len(x)
        pointers = (ctypes.c_void_p(array.ctypes.data) for array in (packed, step, offset, x, scale, y))
        handle.split_product(*map(ctypes.c_int32, sizes), *pointers)
    return y


def check(folder: Path) -> int:
    """Compare every library with the reference at odd sizes, all bytes random: how many products were equal; exits at one that is not."""
    rng, equal = np.random.default_rng(7), 0
    for outputs, inputs, tokens in ((1, 4, 1), (64, 8, 2), (65, 132, 3), (192, 576, 5), (70, 28672, 1)):
        packed = rng.integers(0, 256, (-(-outputs // 64), inputs // 4 * 112), np.uint8)
        x = rng.integers(-128, 128, (tokens, inputs), np.int8)
        step, offset = rng.random((outputs, 2), np.float32), rng.standard_normal((outputs, 2), np.float32)
        scale = rng.random(tokens, np.float32)
        wanted = reference.split_product(packed, step, offset, x, scale[:, None], inputs, outputs)
        for library in sorted(folder.glob("*.so")):
            if product(library, (packed, x, step, offset, scale)).tobytes() != wanted.tobytes():
                sys.exit(f"error: {library.name} must equal the reference, got other bits at {outputs} x {inputs}\nhint: see {folder}")
            equal += 1
    return equal


def figures(folder: Path) -> dict:
    """Sizes and operations of every level, and the versions of the tools."""
    version = subprocess.run([TOOLS[0], "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    # The module that holds the PTX says how long that took, so its size is not always the same.
    files = [(step.level, step.file, step.command[0]) for step in STEPS if step.file != "binary.mlir"]
    files.append(("memrefs: PTX", "kernels.ptx", "mlir-opt-22"))
    levels = [
        {"level": level, "tool": tool, "bytes": (folder / file).stat().st_size, "operations": operations(folder / file)}
        for level, file, tool in files
    ]
    return {"flang": version, "levels": levels}


def table(found: dict) -> str:
    """The figures as the lines of docs/mlir.md."""
    lines = [f"{found['flang']}; {found['products']} products compared, all equal bit for bit.", ""]
    lines += ["| level | made by | bytes | operations |", "| --- | --- | ---: | --- |"]
    for row in found["levels"]:
        counts = ", ".join(f"{name} {count}" for name, count in row["operations"].items())
        lines.append(f"| {row['level']} | `{row['tool']}` | {row['bytes']} | {counts} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description="lower the split product through MLIR and check it")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "build" / "mlir")
    parser.add_argument("--dry", action="store_true", help="leave docs/ alone")
    arguments = parser.parse_args()
    if missing_tools():
        missing = ", ".join(missing_tools())
        sys.exit(f"error: make mlir needs its tools, got none of {missing}\nhint: apt-get install flang-22 mlir-22-tools clang-22")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    lower(arguments.folder)
    found = figures(arguments.folder) | {"products": check(arguments.folder)}
    if not arguments.dry:
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")
        before, _, rest = DOCUMENT.read_text().partition(START)
        DOCUMENT.write_text(before + START + table(found) + END + rest.partition(END)[2])
    print(table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
