"""What backends prepare, remembered per weight.

A backend prepares a layer once: float32 scales, decoded levels. The result is a pure function of the tensors given to the operator,
so the operator itself remembers it and modules hold no state that a move, a deepcopy or a reload could leave stale:
- the cache is keyed by the weight's storage, weakly: when the last tensor on it dies, the entry goes;
- an entry is used only while every tensor has the same storage object, address and version counter as when it was made;
- an entry borrows the packed bytes without owning them (an owner would keep its own key alive) and is only ever used in a call
  that holds the weight. Packed bytes are not duplicated.
Writing through `tensor.data` after the first call bypasses version counters; call `forget_prepared()` after doing that.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from septet.errors import ShapeError
from septet.kernels import LayerWeights, select_backend
from septet.operators.description import LayerDescription

__all__ = ["borrow_array", "forget_prepared", "gpu_layer", "layer_weights", "prepared_layer", "remembered"]

#: weight, scale, input scale, offset; the last two where the code has them.
Tensors = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None", "torch.Tensor | None"]


@dataclass(frozen=True)
class _Stamp:
    """Which bytes a tensor had: its storage (weakly), where in memory, and how often it had been written to."""

    storage: weakref.ref
    address: int
    version: int

    def fits(self, tensor: torch.Tensor | None) -> bool:
        """Whether `tensor` still has the bytes of the stamp."""
        if tensor is None:
            return False
        return self.storage() is tensor.untyped_storage() and self.address == tensor.data_ptr() and self.version == _version(tensor)


@dataclass(frozen=True)
class _Entry:
    """A prepared layer and the tensors it was made of."""

    stamps: tuple[_Stamp | None, ...]
    prepared: object

    def fits(self, tensors: Tensors) -> bool:
        """Whether the tensors are those of the entry, unchanged."""
        return all((tensor is None) if stamp is None else stamp.fits(tensor) for stamp, tensor in zip(self.stamps, tensors))


_Key = tuple[str, int, LayerDescription]
_entries: weakref.WeakKeyDictionary[torch.UntypedStorage, dict[_Key, _Entry]] = weakref.WeakKeyDictionary()


def prepared_layer(tensors: Tensors, description: LayerDescription) -> tuple[ModuleType, object]:
    """The backend in use and what its linear_* functions take for these tensors.

    Args:
        tensors: on the CPU: weight uint8 (int8 for code int8), scale float16, input scale any float dtype or None, offset float16 or None.
        description: of the layer.

    Raises:
        OptionError, ShapeError: the tensors contradict the description; see `LayerWeights`.
    """
    backend = select_backend()
    return backend, remembered(backend.NAME, tensors, description, lambda: backend.prepare(layer_weights(tensors, description)))


def remembered(backend: str, tensors: Tensors, description: LayerDescription, prepare: Callable[[], object]) -> object:
    """What `prepare` made of these tensors, now or earlier.

    Args:
        backend: tells the makers apart.
        tensors: on any device; what is made must not own the weight's storage.
        description: of the layer.
        prepare: called when there is nothing to remember, or a tensor has changed since.
    """
    weight = tensors[0]
    of_storage = _entries.get(weight.untyped_storage())
    # How activations are treated is not part of what is prepared; one entry serves both ways.
    key = (backend, weight.data_ptr(), description._replace(activations=""))
    entry = None if of_storage is None else of_storage.get(key)
    if entry is None or not entry.fits(tensors):
        stamps = tuple(None if tensor is None else _stamp(tensor) for tensor in tensors)
        entry = _Entry(stamps, prepare())
        _entries.setdefault(weight.untyped_storage(), {})[key] = entry
    return entry.prepared


def gpu_layer(tensors: Tensors, description: LayerDescription) -> object:
    """What `septet.gpu.layers` takes for these tensors.

    Args:
        tensors: on one GPU, as for `prepared_layer`.
        description: of the layer.

    Raises:
        OptionError, ShapeError: the tensors contradict the description; see `LayerWeights`.
    """
    from septet.gpu import layers

    def prepare() -> layers.Layer:
        # Shapes are checked by the class that kernels on the CPU trust, too, on arrays without memory.
        checked = layer_weights(tuple(None if tensor is None else _shape_only(tensor) for tensor in tensors), description)
        sizes = checked.code, checked.bits_per_pair, checked.in_features, checked.out_features, checked.input_block, checked.output_block
        return layers.prepare(tensors, sizes, checked.segment)

    # a switch for tests and measurements, so that it takes effect at once
    return remembered("gpu " + os.environ.get(layers.GPU_VARIABLE, ""), tensors, description, prepare)


def forget_prepared() -> None:
    """Drop everything that is remembered; the next call of each layer prepares it again."""
    _entries.clear()


# The native backend reports objects that outlive it.
atexit.register(forget_prepared)


def layer_weights(tensors: Tensors, description: LayerDescription) -> LayerWeights:
    """The tensors as kernels see them: the packed weights borrowed, scales copied."""
    weight, scale, input_scale, offset = tensors
    return LayerWeights(
        code=description.code,
        bits_per_pair=description.bits_per_pair,
        in_features=description.in_features,
        out_features=description.out_features,
        packed=borrow_array(weight),
        scale=_copied(scale),
        offset=_copied(offset),
        input_scale=_copied(input_scale, torch.float16),
        input_block=description.input_block,
        output_block=description.output_block,
        group_size=description.group_size,
        activation_segment=description.activation_scale,
    )


def borrow_array(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor as an array that does not keep them alive; a copy if the tensor is not contiguous.

    Args:
        tensor: on the CPU, int8 or uint8.

    Raises:
        ShapeError: another dtype.
    """
    dtype = {torch.uint8: np.uint8, torch.int8: np.int8}.get(tensor.dtype)
    if dtype is None:
        raise ShapeError("packed weights must be uint8, or int8 in code int8", tensor.dtype, "do not convert the module to another dtype")
    if not tensor.is_contiguous():
        return tensor.detach().contiguous().numpy()
    buffer = (ctypes.c_byte * tensor.numel()).from_address(tensor.data_ptr())
    return np.frombuffer(buffer, dtype).reshape(tensor.shape)


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape and dtype whose memory nobody touches, so that it takes none."""
    return torch.empty(tensor.shape, dtype=tensor.dtype)


def _copied(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> np.ndarray | None:
    """A small tensor as an array of its own, so that it shares no storage with the weight."""
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype, copy=True).contiguous().numpy()


def _stamp(tensor: torch.Tensor) -> _Stamp:
    return _Stamp(weakref.ref(tensor.untyped_storage()), tensor.data_ptr(), _version(tensor))


def _version(tensor: torch.Tensor) -> int:
    """The version counter; tensors made in inference mode have none, and cannot be written to outside it."""
    return -1 if tensor.is_inference() else tensor._version
