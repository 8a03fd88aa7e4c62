"""What is in a checkpoint: one row per quantized layer, and totals. Only headers and config.json are read."""

from __future__ import annotations

import math
from pathlib import Path

from septet.checkpoint.description import check_layer, layers_of, quantization_of
from septet.checkpoint.directory import open_directory

__all__ = ["inspect"]

_EMBEDDING_NAMES = ("embed_tokens", "wte", "word_embeddings", "embeddings", "embed_in", "tok_embeddings")


def inspect(path: Path) -> dict[str, object]:
    """Describe a septet checkpoint.

    Args:
        path: its directory.

    Returns:
        JSON values: `code`, `bits_per_weight`, `head`, `activations`, `activation_scale`; `tensors`, a list with name, role, shape
        (out_features, in_features), code, bits, effective_bits, size_bytes (companions included) and relative_error of each quantized
        layer; `totals`: effective_bits of the linear layers, effective_bits_total of everything, and weights and size_bytes of linear,
        head, embedding, other, total, and total without embeddings and head.

    Raises:
        CheckpointError: a file is damaged, or stored tensors contradict config.json.
        SpecVersionError, UnsupportedModelError: as `quantization_of`.
    """
    directory = open_directory(path)
    quantization = quantization_of(directory.config, str(path))
    sums = {part: [0, 0] for part in ("linear", "head", "embedding", "other")}
    rows, seen = [], set()
    for name, entry in layers_of(quantization).items():
        stored = check_layer(directory, name, entry)
        row = _row(name, entry, sum(tensor.size_bytes for tensor in stored.values()))
        rows.append(row)
        seen |= stored.keys()
        _add(sums, row["role"], math.prod(row["shape"]), row["size_bytes"])
    for key in directory.owners.keys() - seen:
        entry = directory.entry(key)
        part = "embedding" if key.split(".")[-2:][0] in _EMBEDDING_NAMES else "head" if key.startswith("lm_head.") else "other"
        _add(sums, part, math.prod(entry.shape), entry.size_bytes)
    described = {key: quantization.get(key) for key in ("code", "bits_per_weight", "head", "activations", "activation_scale")}
    return described | {"tensors": rows, "totals": _totals(sums)}


def _row(name: str, entry: dict, size_bytes: int) -> dict[str, object]:
    shape, error = [entry["out_features"], entry["in_features"]], entry.get("relative_error")
    role = entry.get("role") if entry.get("role") in ("linear", "head") else "head" if entry["code"] == "int8" else "linear"
    return {
        "name": name,
        "role": role,
        "shape": shape,
        "code": entry["code"],
        "bits": 8.0 if entry["code"] == "int8" else entry["bits_per_pair"] / 2,
        "effective_bits": 8 * size_bytes / math.prod(shape),
        "size_bytes": size_bytes,
        "relative_error": error if type(error) in (int, float) else None,
        "tied": entry.get("tied", []),
    }


def _add(sums: dict[str, list[int]], part: str, weights: int, size_bytes: int) -> None:
    sums[part][0] += weights
    sums[part][1] += size_bytes


def _totals(sums: dict[str, list[int]]) -> dict[str, object]:
    sums = sums | {"total": [sum(column) for column in zip(*sums.values())]}
    sums["total_without_embeddings"] = [linear + other for linear, other in zip(sums["linear"], sums["other"])]
    totals: dict[str, object] = {"effective_bits": _bits(sums["linear"]), "effective_bits_total": _bits(sums["total"])}
    for part, (weights, size_bytes) in sums.items():
        totals |= {f"weights_{part}": weights, f"size_bytes_{part}": size_bytes}
    return totals | {
        "effective_bits_head": _bits(sums["head"]),
        "effective_bits_without_embeddings": _bits(sums["total_without_embeddings"]),
    }


def _bits(part: list[int]) -> float | None:
    weights, size_bytes = part
    return 8 * size_bytes / weights if weights else None
