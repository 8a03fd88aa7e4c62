"""From a septet directory to a native engine: every tensor is read once, checked against its CRC, and copied into place.

Two threads read and check a few slots ahead of the one that copies: checksums take as long as everything else together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
_READERS, _AHEAD = 2, 2
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
    source = _Source(directory, layers_of(quantization), checksums_of(quantization), quantization.get("activation_scale"))
    slots: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, (_EMBEDDING,))]
    if not shape.tied or f"{_HEAD}.weight" in directory.owners:  # `--head trellis` stores a tied head beside its embedding
        slots.append((1, 0, (_HEAD,)))
    for layer in range(shape.layers):
        slots += ((slot, layer, tuple(f"model.layers.{layer}.{module}" for module in modules)) for slot, modules in _SLOTS.items())
    with ThreadPoolExecutor(_READERS) as pool:
        for slot, layer, pending in _read_ahead(pool, source, slots):
            engine.set_weights(slot, layer, [reading.result() for reading in pending])
    engine.set_vector(_FREQUENCIES, 0, shape.frequencies)
    engine.set_vector(_FINAL_NORM, 0, source.vector("model.norm.weight"))
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        for slot, module in (_NORMS | (_HEAD_NORMS if shape.head_norm else {})).items():
            engine.set_vector(slot, layer, source.vector(f"{prefix}{module}.weight"))
        for slot, module in _BIASES.items():
            if f"{prefix}{module}.bias" in directory.owners:
                engine.set_vector(slot, layer, source.vector(f"{prefix}{module}.bias"))
        if shape.windows[layer]:
            engine.set_window(layer, shape.windows[layer])
    source.check_all_read()


def _read_ahead(
    pool: ThreadPoolExecutor, source: _Source, slots: Sequence[tuple[int, int, tuple[str, ...]]]
) -> Iterator[tuple[int, int, list[Future[_native.Layer]]]]:
    """Slots in their order, the readings of the next few already begun."""
    waiting: deque[tuple[int, int, list[Future[_native.Layer]]]] = deque()
    for slot, layer, modules in slots:
        waiting.append((slot, layer, [pool.submit(source.layer, module) for module in modules]))
        if len(waiting) > _AHEAD:
            yield waiting.popleft()
    yield from waiting


@dataclass(eq=False)
class _Source:
    """A checkpoint that hands out checked tensors and remembers which."""

    directory: ModelDirectory
    layers: dict[str, dict]
    checksums: dict[str, str]
    segment: object
    read: set[str] = field(default_factory=set)

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

    def check_all_read(self) -> None:
        """A tensor nobody asked for would silently change what the model says."""
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
        check_crc32(data, self.checksums[key], key)
        self.read.add(key)
        return data


_DTYPES = {"U8": np.uint8, "I8": np.int8, "F16": np.dtype("<f2")}
