"""From a septet directory to a native engine: every tensor is read once, checked against its CRC, and copied into place.

Two threads compute checksums, which take longer than everything else together, beside the one that reads and copies.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from septet import _native
from septet.checkpoint.description import check_layer, checksums_of, layers_of
from septet.checkpoint.directory import ModelDirectory
from septet.checkpoint.integrity import check_crc32
from septet.engine.shape import ModelShape
from septet.errors import CheckpointError, UnsupportedModelError
from septet.kernels import native
from septet.kernels.weights import SEGMENTS, LayerWeights

__all__ = ["fill"]

# As in include/septet.h: the modules of each slot, within the model and within a layer.
_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"
_SLOTS = {
    2: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    3: ("self_attn.o_proj",),
    4: ("mlp.gate_proj", "mlp.up_proj"),
    5: ("mlp.down_proj",),
}
_FREQUENCIES, _FINAL_NORM = 0, 1
_NORMS = {2: "input_layernorm", 3: "post_attention_layernorm"}
_HEAD_NORMS = {4: "self_attn.q_norm", 5: "self_attn.k_norm"}
_BIASES = {6 + index: module for index, module in enumerate(module for modules in _SLOTS.values() for module in modules)}
_CHECKERS, _IN_FLIGHT = 2, 4  # tensors kept in memory for their check
_DENSE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def fill(engine: _native.Engine, directory: ModelDirectory, shape: ModelShape, quantization: Mapping[str, object]) -> None:
    """Set every weight and vector of an engine.

    Args:
        engine: just made, with the sizes of `shape`.
        directory: the opened checkpoint.
        shape: of the model.
        quantization: its quantization_config, version checked.

    Raises:
        CheckpointError: a tensor is missing, damaged, or not what config.json says.
        UnsupportedModelError: the checkpoint holds tensors that the engine would not use.
        ShapeError: a layer's sizes are not those of the model.
    """
    with ThreadPoolExecutor(_CHECKERS) as pool:
        layers, checksums = layers_of(quantization), checksums_of(quantization)
        source = _Source(directory, layers, checksums, quantization.get("activation_scale"), pool)
        _fill_from(source, engine, shape)
        source.finish()


def _fill_from(source: _Source, engine: _native.Engine, shape: ModelShape) -> None:
    owners = source.directory.owners
    engine.set_weights(0, 0, [source.layer(_EMBEDDING)])
    if not shape.tied or f"{_HEAD}.weight" in owners:  # `--head trellis` stores a tied head beside its embedding
        engine.set_weights(1, 0, [source.layer(_HEAD)])
    engine.set_vector(_FREQUENCIES, 0, shape.frequencies)
    engine.set_vector(_FINAL_NORM, 0, source.vector("model.norm.weight"))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for slot, modules in _SLOTS.items():
            engine.set_weights(slot, layer, [source.layer(prefix + module) for module in modules])
        for slot, module in (_NORMS | (_HEAD_NORMS if shape.head_norm else {})).items():
            engine.set_vector(slot, layer, source.vector(f"{prefix}{module}.weight"))
        for slot, module in _BIASES.items():
            if f"{prefix}{module}.bias" in owners:
                engine.set_vector(slot, layer, source.vector(f"{prefix}{module}.bias"))
        if shape.windows[layer]:
            engine.set_window(layer, shape.windows[layer])


@dataclass(eq=False)
class _Source:
    """A checkpoint that hands out tensors, has them checked, and remembers which. Nothing is checked for sure before `finish`."""

    directory: ModelDirectory
    layers: dict[str, dict]
    checksums: dict[str, str]
    segment: object
    pool: ThreadPoolExecutor
    read: set[str] = field(default_factory=set)
    checks: deque[Future[None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.segment not in SEGMENTS:
            raise CheckpointError(f"activation_scale must be {' or '.join(SEGMENTS)}", self.segment, "fetch config.json again")

    def layer(self, module: str) -> _native.Layer:
        """The weights of a module, packed or dense."""
        entry = self.layers.get(module)
        if entry is None:
            return self._dense(f"{module}.weight")
        arrays = {}
        for key, stored in check_layer(self.directory, module, entry).items():
            arrays[key[len(module) + 1 :]] = self._bytes(key).view(_DTYPES[stored.dtype]).reshape(stored.shape)
        weights = LayerWeights(
            code=entry["code"],
            bits_per_pair=entry["bits_per_pair"],
            in_features=entry["in_features"],
            out_features=entry["out_features"],
            packed=arrays["weight"],
            scale=arrays["weight_scale"],
            offset=arrays.get("weight_offset"),
            input_scale=arrays.get("weight_input_scale"),
            input_block=entry.get("input_block", 1),
            output_block=entry.get("output_block", 1),
            group_size=entry.get("group_size"),
            activation_segment=self.segment if entry["code"] == "trellis" else "token",
        )
        return native.prepare(weights).kernel

    def vector(self, key: str) -> np.ndarray:
        """A one-dimensional float tensor as float32."""
        dtype, raw, shape = self._floats(key)
        if len(shape) != 1:
            raise CheckpointError(f"{key} must have one dimension", list(shape), "fetch the checkpoint again")
        if dtype == "BF16":
            return (raw.view("<u2").astype("<u4") << np.uint32(16)).view("<f4")
        return raw.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)

    def finish(self) -> None:
        """All checks end well, and all tensors were asked for: another would silently change what the model says."""
        self._wait_for_checks(0)
        for key in sorted(self.directory.owners.keys() - self.read):
            hint = "run this model through transformers"
            raise UnsupportedModelError("for the native engine, every tensor must have its place", key, hint)

    def _dense(self, key: str) -> _native.Layer:
        dtype, raw, shape = self._floats(key)
        if len(shape) != 2:
            raise CheckpointError(f"{key} must have two dimensions", list(shape), "fetch the checkpoint again")
        return _native.Layer(raw.view("<f4" if dtype == "F32" else "<u2").reshape(shape), _DENSE[dtype])

    def _floats(self, key: str) -> tuple[str, np.ndarray, tuple[int, ...]]:
        if key not in self.directory.owners:
            raise CheckpointError(f"the checkpoint must hold {key}", "no such tensor", "fetch the checkpoint again")
        stored = self.directory.entry(key)
        if stored.dtype not in _DENSE:
            hint = "run this model through transformers"
            raise UnsupportedModelError(f"for the native engine, {key} must be float32, float16 or bfloat16", stored.dtype, hint)
        return stored.dtype, self._bytes(key), stored.shape

    def _bytes(self, key: str) -> np.ndarray:
        data = self.directory.file_of(key).read(key)
        if key not in self.checksums:
            raise CheckpointError(f"config.json must list a crc32 of {key}", "none", "fetch config.json and the weights again, together")
        self.checks.append(self.pool.submit(check_crc32, data, self.checksums[key], key))
        self._wait_for_checks(_IN_FLIGHT)
        self.read.add(key)
        return data

    def _wait_for_checks(self, left: int) -> None:
        while len(self.checks) > left:
            self.checks.popleft().result()


_DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.dtype("<f2")}
