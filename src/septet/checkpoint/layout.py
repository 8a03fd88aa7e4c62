"""Where every tensor of a new checkpoint will lie, known before the first one is made.

Sizes follow from shapes and options, so headers and offsets are fixed from the start: tensors can be written in any order,
and an interrupted run goes on where it was. A shard is filled in the order of the plan; inside it wide dtypes come first, which
keeps every tensor aligned.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

from septet.checkpoint.tensor_file import DTYPE_BYTES

__all__ = ["INDEX_NAME", "OutputTensor", "Shard", "index_of", "plan_shards"]

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to be written: key, dtype as safetensors names it, shape."""

    key: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """One file of the new checkpoint.

    Args:
        name: file name.
        head: the length and the header, the bytes before the data.
        offsets: key -> first byte in the file.
        size_bytes: of the whole file.
    """

    name: str
    head: bytes
    offsets: dict[str, int]
    size_bytes: int


def plan_shards(tensors: list[OutputTensor], max_bytes: int) -> list[Shard]:
    """Distribute tensors over files.

    Args:
        tensors: in the order of the plan.
        max_bytes: data of one file; a larger tensor gets a file of its own.

    Returns:
        At least one shard.
    """
    parts: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if parts[-1] and filled + tensor.size_bytes > max_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.size_bytes
    names = ["model.safetensors"]
    if len(parts) > 1:
        names = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    return [_lay_out(name, part) for name, part in zip(names, parts)]


def _lay_out(name: str, tensors: list[OutputTensor]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    relative: dict[str, int] = {}
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype]):
        relative[tensor.key] = position
        offsets = [position, position + tensor.size_bytes]
        header[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {key: start + offset for key, offset in relative.items()}
    return Shard(name, len(text).to_bytes(8, "little") + text, offsets, start + position)


def index_of(shards: list[Shard]) -> dict[str, object]:
    """The content of model.safetensors.index.json."""
    total = sum(shard.size_bytes - len(shard.head) for shard in shards)
    return {"metadata": {"total_size": total}, "weight_map": {key: shard.name for shard in shards for key in sorted(shard.offsets)}}
