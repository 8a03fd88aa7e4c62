"""Modules that hold packed weights: SeptetLinear, SeptetEmbedding.

Parameters have the names and shapes of the checkpoint: weight (packed), weight_scale, weight_input_scale, weight_offset, and the bias
of the dense layer. They keep their dtype when the model is converted, with one exception: the input scale of code int8 is only signs,
exact in any dtype, so it follows the model's dtype and tells an embedding in which dtype to answer. What a kernel prepares is not
module state; it is remembered by the operators.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from septet import operators
from septet.codes.tile import TILE_INPUTS, TILE_OUTPUTS, tile_bytes
from septet.errors import CheckpointError, UnsupportedModelError
from septet.operators import LayerDescription
from septet.quantize import QuantizedTensor
from septet.quantize.stored import stored_arrays

__all__ = ["PARTS", "SeptetEmbedding", "SeptetLinear", "SeptetModule"]

#: The last part of every key a quantized module can have; the input scale first, because of `PreTrainedModel.dtype` (see below).
PARTS = ("weight_input_scale", "weight", "weight_scale", "weight_offset")
_TORCH_DTYPES = {"uint8": torch.uint8, "int8": torch.int8, "float16": torch.float16}
_AGAIN = "fetch the checkpoint again, or quantize again"
_BLOCKS = ("output_block", "input_block")


def _bits_per_pair(entry: Mapping[str, object], name: str) -> int:
    """The width of an entry whose numbers `stored_arrays` has checked, if its code has that width."""
    bits, code = entry.get("bits_per_pair"), entry["code"]
    known = {"trellis": (6, 7, 8), "split": (7,), "int8": (16,)}[code]
    if bits not in known:
        raise CheckpointError(
            f"{code} must have {' or '.join(map(str, known))} bits per pair", f"{bits!r} for {name} in config.json", _AGAIN
        )
    return bits


def _block(entry: Mapping[str, object], key: str, features: int, name: str) -> int:
    """A Hadamard block of an entry; 1 where it has none."""
    block = entry.get(key, 1)
    if type(block) is not int or block < 1 or block & (block - 1) or features % block:
        raise CheckpointError(f"{key} must be a power of two that divides {features}", f"{block!r} for {name} in config.json", _AGAIN)
    return block


class SeptetModule(nn.Module):
    """What both kinds of modules share: the parameters of a packed matrix.

    transformers takes the first floating parameter of a model for the model's dtype. In an embedding this is the input scale, which
    therefore comes first and follows the model's dtype.

    Args:
        entry: the matrix's description, as `QuantizedTensor.config` makes it.
        name: module name, for messages.
        dtype: of the model; that of the input scale of code int8. None is float16.
        device: of the parameters; "meta" for a model that is still to be loaded.

    Raises:
        CheckpointError: the description is not one.
    """

    def __init__(self, entry: Mapping[str, object], name: str, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
        super().__init__()
        arrays = stored_arrays(entry, name)
        self._packed_shape = arrays["weight"][1]
        self.code: str = entry["code"]
        self.bits_per_pair: int = _bits_per_pair(entry, name)
        self.shape: tuple[int, int] = entry["out_features"], entry["in_features"]
        self.output_block, self.input_block = (_block(entry, key, size, name) for key, size in zip(_BLOCKS, self.shape))
        self.group_size: int | None = entry.get("group_size")
        #: The dense module whose place this one took, without weights, for the way back; in a tuple, so that it is no submodule.
        self.replaced: tuple[nn.Module, ...] = ()
        for part in PARTS:
            stored, shape = arrays.get(part, (None, None))
            if stored is None:
                self.register_parameter(part, None)
                continue
            wanted = _TORCH_DTYPES[stored.name]
            if part == "weight_input_scale" and self._signs_only:
                wanted = dtype or wanted
            self.register_parameter(part, nn.Parameter(torch.empty(shape, dtype=wanted, device=device), requires_grad=False))

    @property
    def _signs_only(self) -> bool:
        """Whether the input scale is random signs and nothing else."""
        return self.code == "int8"

    def fill(self, quantized: QuantizedTensor, device: torch.device | str | None = None) -> None:
        """Take over quantized arrays, without a copy where they are on the right device already.

        Args:
            quantized: what the module's entry describes.
            device: where the parameters shall be.
        """
        arrays = quantized.tensors()
        for part in PARTS:
            if part in arrays:
                tensor = torch.from_numpy(arrays[part]).to(device=device, dtype=getattr(self, part).dtype)
                setattr(self, part, nn.Parameter(tensor, requires_grad=False))

    def share(self, other: SeptetModule) -> None:
        """Use the parameters of another module of the same matrix, as a tied head does."""
        for part in PARTS:
            setattr(self, part, getattr(other, part))

    def dequantize(self) -> torch.Tensor:
        """The weights that the packed ones stand for: float32 [N, K], on the device of the weight."""
        if self.weight.device.type in ("cpu", "cuda"):
            return operators.dequantize(self._tensors(), self._description())
        stored = [None if tensor is None else tensor.cpu() for tensor in self._tensors()]
        return operators.dequantize(tuple(stored), self._description()).to(self.weight.device)

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        return self.weight, self.weight_scale, self.weight_input_scale, self.weight_offset

    def _description(self, activation_scale: str = "token", activations: str = "int8") -> LayerDescription:
        """The description of the tensors at hand, which under tensor parallelism are a slice of the layer."""
        outputs, inputs = self.shape if self.weight.shape == self._packed_shape else self._slice_shape()
        blocks = self.input_block, self.output_block, self.group_size
        return LayerDescription(self.code, self.bits_per_pair, inputs, outputs, *blocks, activation_scale, activations)

    def _slice_shape(self) -> tuple[int, int]:
        """(N, K) of a slice; padding is at the end of the whole layer only, so an axis that is cut has none."""
        if self.code == "int8":
            return tuple(self.weight.shape)
        rows, packed_bytes = self.weight.shape
        outputs = self.shape[0] if rows == self._packed_shape[0] else rows * TILE_OUTPUTS
        whole = packed_bytes == self._packed_shape[1]
        return outputs, self.shape[1] if whole else packed_bytes // tile_bytes(self.bits_per_pair) * TILE_INPUTS

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Move parameters, but let no `model.to(dtype)` change what is stored."""
        follows = self.weight_input_scale if self._signs_only else None
        kept = {id(tensor) for tensor in self._tensors() if tensor is not None and tensor is not follows}

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if id(tensor) not in kept or moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class SeptetLinear(SeptetModule):
    """A linear layer with packed weights, y = W x + bias.

    Args:
        entry, name, dtype, device: as in `SeptetModule`.
        bias: the bias of the dense layer, which the new layer then shares, or None.

    Attributes:
        in_features, out_features: of the whole layer, also where tensor parallelism has cut it.
        activations: "int8" or "float"; may be changed at any time.
        activation_scale: "token" or "block".
        transposed: whether the dense layer was a Conv1D, whose weight is [K, N].
    """

    #: transformers' tensor parallelism then hands `forward` plain tensors.
    _hf_quantized_needs_local_tp = True

    def __init__(
        self,
        entry: Mapping[str, object],
        name: str = "weight",
        bias: nn.Parameter | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(entry, name, dtype, device)
        self.register_parameter("bias", bias)
        self.out_features, self.in_features = self.shape
        self.activations = "int8"
        self.activation_scale = "token"
        self.transposed = False

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, bias: nn.Parameter | None = None) -> SeptetLinear:
        """A layer that holds the arrays of `quantized`, without copying them."""
        layer = cls(quantized.config(), bias=bias, device="meta")
        layer.fill(quantized, "cpu")
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32, bfloat16 or float16 [..., K] -> [..., N] of the same dtype."""
        y = operators.linear(x, self._tensors(), self._description(self.activation_scale, self.activations))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def on_gpu(self) -> object:
        """What the kernels of the GPU keep of this layer, made now or earlier: a `septet.gpu.layers.Layer`."""
        return operators.gpu_layer(self._tensors(), self._description(self.activation_scale, self.activations))

    def extra_repr(self) -> str:
        """The line that print(model) shows."""
        bits = 8 if self.code == "int8" else self.bits_per_pair / 2
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"code={self.code}, bits_per_weight={bits:g}, activations={self.activations}"
        )


class SeptetEmbedding(SeptetModule):
    """An embedding of int8 rows.

    Args:
        entry, name, dtype, device: as in `SeptetModule`; the code must be int8.

    Attributes:
        num_embeddings, embedding_dim: as in nn.Embedding.
        factor: a number to multiply rows with (some models scale their embedding), or None.
        factor_in_dtype: whether the factor is rounded to the dtype of the rows before.

    Raises:
        UnsupportedModelError: the code is not int8.
    """

    def __init__(
        self,
        entry: Mapping[str, object],
        name: str = "weight",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(entry, name, dtype, device)
        if self.code != "int8":
            raise UnsupportedModelError("an embedding must have the code int8", f"{self.code} for {name}", "use head=int8")
        self.num_embeddings, self.embedding_dim = self.shape
        self.padding_idx = None
        self.factor: float | None = None
        self.factor_in_dtype = False

    @classmethod
    def from_quantized(cls, quantized: QuantizedTensor, dtype: torch.dtype | None = None) -> SeptetEmbedding:
        """An embedding that holds the arrays of `quantized`, answering in `dtype`."""
        embedding = cls(quantized.config(), dtype=dtype, device="meta")
        embedding.fill(quantized, "cpu")
        return embedding

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """int32 or int64, any shape -> [..., K] in the model's dtype."""
        rows = operators.embedding(indices, self.weight, self.weight_scale, self.weight_input_scale, self.input_block)
        if self.factor is None:
            return rows
        return rows * (torch.tensor(self.factor, dtype=rows.dtype, device=rows.device) if self.factor_in_dtype else self.factor)

    def extra_repr(self) -> str:
        """The line that print(model) shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, code={self.code}"
