"""Run with TRITON_INTERPRET=1: every code through the Triton kernels on the CPU, beside the reference. Status 1 if anything differs.

A process of its own, because Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

import tolerances
import triton_interpreter  # noqa: F401
from layers import int8_layer, split_layer, trellis_layer
from septet.gpu import layers as gpu
from septet.kernels import LayerWeights, reference


def cases(rng: np.random.Generator) -> dict[str, LayerWeights]:
    """Layers of every code and width, with odd sizes."""
    return {
        "trellis 7, odd sizes": trellis_layer(rng, 7, 70, 37),
        "trellis 6, segments": trellis_layer(rng, 6, 64, 96, (32, 64), activation_segment="block"),
        "trellis 8, rotated": trellis_layer(rng, 8, 66, 20, (4, 2)),
        "split": split_layer(rng, 70, 50),
        "split, groups, symmetric": split_layer(rng, 70, 50, group_size=16, symmetric=True),
        "split, one scale": split_layer(rng, 33, 12, "tensor"),
        "int8": int8_layer(rng, 33, 48, 16),
    }


def on_gpu_path(layer: LayerWeights, x: np.ndarray, activations: str) -> np.ndarray:
    """The layer through `septet.gpu.layers`, on CPU tensors."""
    arrays = layer.packed, layer.scale, layer.input_scale, layer.offset
    tensors = tuple(None if array is None else torch.from_numpy(array.copy()) for array in arrays)
    sizes = layer.code, layer.bits_per_pair, layer.in_features, layer.out_features, layer.input_block, layer.output_block
    prepared = gpu.prepare(tensors, sizes, layer.segment)
    return gpu.linear(torch.from_numpy(x), tensors[0], prepared, activations).numpy()


def failures() -> list[str]:
    """What differs from the reference."""
    rng = np.random.default_rng(5)
    found = []
    for name, layer in cases(rng).items():
        x = rng.standard_normal((3, layer.in_features), np.float32)
        x[1] *= 1e-3
        prepared = reference.prepare(layer)
        product = getattr(reference, f"linear_{layer.code}")
        if not np.array_equal(on_gpu_path(layer, x, "int8"), product(x, prepared, "int8")):
            found.append(f"{name}: int8 activations do not give the reference's bits")
        wanted = product(x, prepared, "float")
        weight = np.abs(product(np.eye(layer.in_features, dtype=np.float32), prepared, "float")).T
        bound = 4 * tolerances.float_product(x, weight) + 4e-6 * np.abs(wanted).max()
        if not (np.abs(on_gpu_path(layer, x, "float") - wanted) <= bound).all():
            found.append(f"{name}: float activations are too far from the reference")
    bad = np.ones((2, 37), np.float32)
    bad[0, 5] = np.nan
    y = on_gpu_path(cases(rng)["trellis 7, odd sizes"], bad, "int8")
    if not (np.isnan(y[0]).all() and np.isfinite(y[1]).all()):
        found.append("a NaN must fill its own token and no other")
    return found


if __name__ == "__main__":
    problems = failures()
    print("\n".join(problems))
    sys.exit(bool(problems))
