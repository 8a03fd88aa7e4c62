"""Which arrays a layer's description promises: the dtype and shape of every companion, from its entry in config.json.

Descriptions come from files that may be damaged or hostile, so every number is checked before anything is computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from septet.codes.tile import BITS_PER_PAIR, tile_bytes, tile_grid
from septet.errors import CheckpointError
from septet.kernels.weights import CODES, MAX_IN_FEATURES

__all__ = ["stored_arrays"]

_MAX_FEATURES = 1 << 31


def stored_arrays(entry: Mapping[str, object], name: str) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """The arrays that a layer must have.

    Args:
        entry: as `QuantizedTensor.config` makes it; not trusted.
        name: the module, for messages.

    Returns:
        Last part of the key ("weight", "weight_scale", ...) -> dtype and shape.

    Raises:
        CheckpointError: the entry lacks a number, or one of them is impossible.
    """
    code = entry.get("code")
    if code not in CODES:
        raise _damaged(name, f"code must be one of {', '.join(CODES)}", code)
    outputs = _integer(entry, "out_features", name, 1, _MAX_FEATURES)
    inputs = _integer(entry, "in_features", name, 1, MAX_IN_FEATURES)
    arrays: dict[str, tuple[np.dtype, tuple[int, ...]]] = {"weight": (np.dtype(np.int8), (outputs, inputs))}
    if code != "int8":
        bits = _integer(entry, "bits_per_pair", name, BITS_PER_PAIR[0], BITS_PER_PAIR[-1])
        rows, columns = tile_grid(outputs, inputs)
        arrays["weight"] = np.dtype(np.uint8), (rows, columns * tile_bytes(bits))
    half = np.dtype(np.float16)
    if code != "split":
        return arrays | {"weight_scale": (half, (outputs,)), "weight_input_scale": (half, (inputs,))}
    group_size = entry.get("group_size")
    groups = 1 if group_size is None else -(-inputs // _integer(entry, "group_size", name, 4, _MAX_FEATURES))
    shape = _integer(entry, "scale_rows", name, 1, outputs), 2 * groups
    if shape[0] not in (1, outputs):
        raise _damaged(name, f"scale_rows must be 1 or {outputs}", shape[0])
    arrays["weight_scale"] = half, shape
    if not entry.get("symmetric"):
        arrays["weight_offset"] = half, shape
    return arrays


def _integer(entry: Mapping[str, object], key: str, name: str, least: int, largest: int) -> int:
    value = entry.get(key)
    if type(value) is not int or not least <= value <= largest:
        raise _damaged(name, f"{key} must be a whole number in {least}..{largest}", value)
    return value


def _damaged(name: str, requirement: str, got: object) -> CheckpointError:
    return CheckpointError(requirement, f"{got!r} for {name} in config.json", "fetch the checkpoint again, or quantize again")
