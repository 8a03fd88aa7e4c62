"""What a model costs on disk, in bits per weight.

`effective_bits` counts the linear layers without embeddings and head, every companion tensor (scales, offsets) included;
`effective_bits_total` counts all tensors against all weights. Both come from the files, not from what is in memory.
"""

from __future__ import annotations

import math
from pathlib import Path

from septet import checkpoint
from septet.checkpoint.directory import open_directory
from septet.loading import is_gguf, is_septet

__all__ = ["effective_bits"]


def effective_bits(path: Path, linear_layers: list[str]) -> tuple[float | None, float | None]:
    """Bits per weight of a model's files.

    Args:
        path: a septet directory, a Hugging Face directory or a .gguf file.
        linear_layers: module names of the linear layers, embeddings and head apart (for unquantized directories).

    Returns:
        (of the linear layers, of everything); None where the files do not tell.
    """
    if is_gguf(path):
        return _gguf_bits(path)
    if is_septet(path):
        totals = checkpoint.inspect(path)["totals"]
        return totals["effective_bits"], totals["effective_bits_total"]
    return _directory_bits(path, linear_layers)


def _directory_bits(path: Path, linear_layers: list[str]) -> tuple[float | None, float | None]:
    directory = open_directory(path)
    entries = {key: directory.entry(key) for key in directory.owners}
    counted = {key: (math.prod(entry.shape), entry.size_bytes) for key, entry in entries.items()}
    wanted = {f"{layer}.weight" for layer in linear_layers}
    return _bits([size for key, size in counted.items() if key in wanted]), _bits(list(counted.values()))


def _gguf_bits(path: Path) -> tuple[float | None, float | None]:
    from gguf import GGUFReader

    tensors = GGUFReader(str(path)).tensors
    blocks = [(int(t.n_elements), int(t.n_bytes)) for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return _bits(blocks), _bits([(int(t.n_elements), int(t.n_bytes)) for t in tensors])


def _bits(sizes: list[tuple[int, int]]) -> float | None:
    weights = sum(count for count, _ in sizes)
    return 8 * sum(size for _, size in sizes) / weights if weights else None
