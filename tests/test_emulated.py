"""The NEON kernels without an ARM machine: cross-compiled, and run by qemu as processors with and without the dot and matrix products.

Python itself is not emulated. `native/tests/compare_sets.cpp` runs the C interface at odd sizes with every set, compares each with the
plain kernels, and those with the golden vectors.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from needs import program, skip_module_without
from septet.codes.tile import TILE_OUTPUTS
from test_golden import FILES, array_of, layer_of

NATIVE = Path(__file__).parent.parent / "native"
CODES = {"split": 0, "trellis": 1, "int8": 2}
#: processor -> the sets that it must run
PROCESSORS = {"max": "scalar,neon,neon-dotprod,neon-i8mm", "cortex-a76": "scalar,neon,neon-dotprod", "cortex-a57": "scalar,neon"}


TOOLS = {
    "g++-aarch64-linux-gnu": program("aarch64-linux-gnu-g++"),
    "qemu-user-static": program("qemu-aarch64-static", "qemu-aarch64"),
    "cmake": program("cmake"),
}
skip_module_without("emulated-neon", "without them NEON's kernels run on ARM's processors only")
assert TOOLS["cmake"] is not None, "cmake must be on the path or beside the interpreter: make test installs it"


@pytest.fixture(scope="module")
def compare_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program, built by the project's own CMake files; a warning is an error."""
    folder = tmp_path_factory.mktemp("aarch64")
    options = {
        "CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": "aarch64", "CMAKE_CXX_COMPILER": TOOLS["g++-aarch64-linux-gnu"],
        "SEPTET_OPTIMIZE": "-O1", "SEPTET_WERROR": "ON",
    }  # fmt: skip
    run(TOOLS["cmake"], "-S", str(NATIVE), "-B", str(folder), *(f"-D{name}={value}" for name, value in options.items()))
    run(TOOLS["cmake"], "--build", str(folder), "--target", "compare_sets", "-j", str(len(os.sched_getaffinity(0))))
    return folder / "compare_sets"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def emulated(processor: str, *command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run([TOOLS["qemu-user-static"], "-cpu", processor, *map(str, command)], capture_output=True, text=True)


def stored_layer(path: Path) -> bytes:
    """A golden layer as compare_sets reads it: 9 numbers, then each array behind its size in bytes."""
    golden = json.loads(path.read_text())
    layer, x, y = layer_of(golden), array_of(golden["x"]), array_of(golden["y_int8"])
    scales = [None if array is None else array.astype("<f4") for array in (layer.scale, layer.offset)]
    if layer.code == "split":
        scales = [None if array is None else transposed(array, layer.out_features) for array in scales]
    sizes = layer.in_features, layer.out_features, layer.input_block, layer.output_block, layer.group_size or 0, layer.segment, len(x)
    arrays = [layer.packed, *scales, None if layer.input_scale is None else layer.input_scale.astype("<f4"), x, y]
    texts = [b"" if array is None else np.ascontiguousarray(array).tobytes() for array in arrays]
    numbers = np.array([CODES[layer.code], layer.bits_per_pair, *sizes], "<i8").tobytes()
    return numbers + b"".join(len(text).to_bytes(8, "little") + text for text in texts)


def transposed(scales: np.ndarray, outputs: int) -> np.ndarray:
    """Scales of the split code as the C interface wants them: [2*G, N padded to whole tiles]."""
    result = np.zeros((scales.shape[1], -(-outputs // TILE_OUTPUTS) * TILE_OUTPUTS), "<f4")
    result[:, :outputs] = scales.T
    return result


@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_set_equals_the_plain_kernels(compare_sets: Path, processor: str, tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    layers.write_bytes(b"".join(map(stored_layer, FILES)))
    done = emulated(processor, compare_sets, PROCESSORS[processor], layers)
    assert done.returncode == 0, done.stderr
    assert f"and {len(FILES)} layers on {PROCESSORS[processor]}: 0 failures" in done.stdout


def test_a_wrong_output_and_a_missing_set_are_found(compare_sets: Path, tmp_path: Path) -> None:
    layers = tmp_path / "layers"
    layers.write_bytes(stored_layer(FILES[-1])[:-1] + b"\x55")
    done = emulated("cortex-a57", compare_sets, "scalar,neon", layers)
    assert done.returncode == 1 and "neon: layer 0 of the file must have the outputs" in done.stderr
    assert emulated("cortex-a57", compare_sets, "scalar,neon,neon-dotprod", layers).returncode == 2
