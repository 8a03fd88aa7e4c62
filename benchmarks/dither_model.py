"""Make a model whose weights lie on no 4-bit grid, out of one whose weights do: for a fair comparison of 4-bit types.

    python benchmarks/dither_model.py MODEL OUT

Weights that came as GGUF Q4_1 lie on 16 levels within 32 neighbouring inputs. Types with such blocks find those levels again and lose
next to nothing; that says nothing about other models. So uniform noise of one step is added to every such weight. What comes out is
another, slightly worse model, but an honest original: whoever rounds it loses something. Matrices without such a grid stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

__all__ = ["dither", "lies_on_grid"]

BLOCK = 32
LEVELS = 16


def main() -> int:
    """Write the dithered model; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("out", type=Path, help="made; must not exist")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shutil.copytree(arguments.model, arguments.out)
    changed = 0
    for path in sorted(arguments.out.glob("*.safetensors")):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if lies_on_grid(tensor):
                tensors[name] = dither(tensor, zlib.crc32(name.encode()) + arguments.seed)
                changed += 1
        save_file(tensors, path, metadata={"format": "pt"})
    print(f"{changed} matrices dithered")
    return 0 if changed else 1


def lies_on_grid(tensor: torch.Tensor) -> bool:
    """Whether blocks of 32 inputs hold at most 16 values; a few thousand blocks are looked at."""
    if tensor.ndim != 2 or tensor.shape[1] % BLOCK:
        return False
    blocks = np.sort(tensor.float().numpy().reshape(-1, BLOCK)[:4096], axis=1)
    return bool(((np.diff(blocks, axis=1) > 0).sum(axis=1) < LEVELS).all())


def dither(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Add uniform noise of one step of the grid.

    Args:
        tensor: [N, K], K a multiple of 32; within a block the levels go from the smallest to the largest value.
        seed: of the noise.

    Returns:
        [N, K] in the same dtype.
    """
    blocks = tensor.float().numpy().reshape(-1, BLOCK)
    step = (blocks.max(axis=1, keepdims=True) - blocks.min(axis=1, keepdims=True)) / (LEVELS - 1)
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
    return torch.from_numpy((blocks + step * noise).reshape(tensor.shape)).to(tensor.dtype)


if __name__ == "__main__":
    sys.exit(main())
