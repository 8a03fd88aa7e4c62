"""Write the golden vectors of SPEC.md section 9: small layers of every code and width, their bytes, inputs and exact results.

    python tools/make_golden.py            # writes tests/golden/v0/*.json
    python tools/make_golden.py --check    # exit 1 when a file is not what this would write

Everything is arithmetic on a 32-bit linear congruential generator, so that a reader in any language can be checked without
NumPy. Arrays are hexadecimal strings of their little-endian bytes. Only the reference backend is used.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from septet.codes.tile import tile_bytes, tile_grid  # noqa: E402
from septet.kernels import LayerWeights, reference  # noqa: E402

FOLDER = ROOT / "tests" / "golden" / "v0"


class Sequence:
    """x -> 1664525 x + 1013904223 modulo 2^32; the high bits of each new x are used."""

    def __init__(self, seed: int) -> None:
        self.x = seed

    def draw(self, count: int) -> np.ndarray:
        """The next `count` values, uint32."""
        values = np.empty(count, np.uint32)
        for i in range(count):
            self.x = (1664525 * self.x + 1013904223) & 0xFFFFFFFF
            values[i] = self.x
        return values

    def bytes(self, *shape: int) -> np.ndarray:
        """uint8, the top byte of each value."""
        return (self.draw(int(np.prod(shape))) >> 24).astype(np.uint8).reshape(shape)

    def numbers(self, *shape: int) -> np.ndarray:
        """float32 in [-1, 1), multiples of 2^-15."""
        top = (self.draw(int(np.prod(shape))) >> 16).astype(np.int32) - 32768
        return (top.astype(np.float32) / np.float32(32768)).reshape(shape)


def text_of(array: np.ndarray) -> dict[str, object]:
    """An array as JSON."""
    little = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
    return {"dtype": array.dtype.name, "shape": list(array.shape), "hex": little.tobytes().hex()}


def trellis_layer(bits: int, outputs: int, inputs: int, segment: str) -> LayerWeights:
    """A layer of random bytes; every byte string is a valid stream."""
    sequence = Sequence(1000 * bits + outputs)
    rows, columns = tile_grid(outputs, inputs)
    return LayerWeights(
        code="trellis",
        bits_per_pair=bits,
        in_features=inputs,
        out_features=outputs,
        packed=sequence.bytes(rows, columns * tile_bytes(bits)),
        scale=(sequence.numbers(outputs) / 64).astype(np.float16),
        input_scale=np.where(sequence.bytes(inputs) & 1, -1, 1).astype(np.float16),
        input_block=inputs & -inputs,
        output_block=outputs & -outputs,
        activation_segment=segment,
    )


def split_layer(outputs: int, inputs: int, group: int | None, symmetric: bool) -> LayerWeights:
    """A layer of random bytes with random scales."""
    sequence = Sequence(7000 + outputs + inputs)
    rows, columns = tile_grid(outputs, inputs)
    groups = 1 if group is None else -(-inputs // group)
    return LayerWeights(
        code="split",
        bits_per_pair=7,
        in_features=inputs,
        out_features=outputs,
        packed=sequence.bytes(rows, columns * tile_bytes(7)),
        scale=sequence.numbers(outputs, 2 * groups).astype(np.float16),
        offset=None if symmetric else sequence.numbers(outputs, 2 * groups).astype(np.float16),
        group_size=group,
    )


def int8_layer(outputs: int, inputs: int) -> LayerWeights:
    """A head of random bytes without -128."""
    sequence = Sequence(8000 + outputs)
    levels = np.maximum(sequence.bytes(outputs, inputs).astype(np.int16) - 128, -127).astype(np.int8)
    signs = np.where(sequence.bytes(inputs) & 1, -1, 1).astype(np.float16)
    scale = np.abs(sequence.numbers(outputs)).astype(np.float16)
    return LayerWeights("int8", 16, inputs, outputs, levels, scale, input_scale=signs, input_block=inputs & -inputs)


def described(layer: LayerWeights) -> dict[str, object]:
    """One golden file: the layer, three tokens, the decoded levels and the result with int8 activations."""
    x = Sequence(42).numbers(3, layer.in_features)
    arrays = {"weight": layer.packed, "weight_scale": layer.scale, "weight_offset": layer.offset, "weight_input_scale": layer.input_scale}
    linear = {"trellis": reference.linear_trellis, "split": reference.linear_split, "int8": reference.linear_int8}[layer.code]
    result: dict[str, object] = {
        "code": layer.code,
        "bits_per_pair": layer.bits_per_pair,
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "input_block": layer.input_block,
        "output_block": layer.output_block,
        "group_size": layer.group_size,
        "activation_scale": layer.activation_segment,
        "tensors": {name: text_of(array) for name, array in arrays.items() if array is not None},
    }
    if layer.code == "trellis":
        result["levels"] = text_of(reference.trellis_levels(layer.packed, layer.bits_per_pair))
    if layer.code == "split":
        result["fields"] = text_of(reference.split_fields(layer.packed))
    return result | {"x": text_of(x), "y_int8": text_of(linear(x, reference.prepare(layer), "int8"))}


def golden_files() -> dict[str, str]:
    """File name -> content."""
    layers = {
        "trellis-6-token": trellis_layer(6, 3, 12, "token"),
        "trellis-7-token": trellis_layer(7, 66, 16, "token"),
        "trellis-7-block": trellis_layer(7, 4, 24, "block"),
        "trellis-8-odd": trellis_layer(8, 5, 7, "token"),
        "split-channel": split_layer(3, 10, None, False),
        "split-symmetric": split_layer(2, 5, None, True),
        "split-group": split_layer(4, 22, 8, False),
        "int8": int8_layer(6, 20),
    }
    return {f"{name}.json": json.dumps(described(layer), indent=1) + "\n" for name, layer in layers.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description="write the golden vectors")
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 when a file differs")
    check = parser.parse_args().check
    stale = []
    for name, text in golden_files().items():
        path = FOLDER / name
        if not path.exists() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    print(("stale: " if check else "written: ") + (", ".join(stale) or "none"))
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
