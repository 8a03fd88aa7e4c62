"""What an operator must know of a layer besides its tensors, in the order in which the schemas list it."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SCHEMA", "LayerDescription"]

#: The part of the operator schemas that describes a layer; the fields of LayerDescription, one to one.
SCHEMA = (
    "str code, int bits_per_pair, int in_features, int out_features, int input_block, int output_block, int? group_size, "
    "str activation_scale, str activations"
)


class LayerDescription(NamedTuple):
    """A layer without its tensors.

    Args:
        code: "trellis", "split" or "int8".
        bits_per_pair: 6, 7 or 8; 16 for int8.
        in_features: K of the tensors at hand (a tensor-parallel slice has fewer than the layer).
        out_features: N of the tensors at hand.
        input_block: Hadamard block along the inputs.
        output_block: Hadamard block along the outputs.
        group_size: inputs per group of split, None for one group.
        activation_scale: "token" or "block".
        activations: "int8" or "float".
    """

    code: str
    bits_per_pair: int
    in_features: int
    out_features: int
    input_block: int = 1
    output_block: int = 1
    group_size: int | None = None
    activation_scale: str = "token"
    activations: str = "int8"
