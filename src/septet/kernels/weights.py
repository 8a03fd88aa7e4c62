"""The weights of one linear layer as a kernel sees them: stored arrays, plus what is needed to read them.

The arrays are views of the stored tensors, never copies. Everything is checked once, here, so that kernels need not distrust
their input: a wrong size would otherwise be an out-of-bounds read in native code.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from septet.codes.tile import TILE_INPUTS, tile_bytes, tile_grid
from septet.errors import OptionError, ShapeError

__all__ = ["CODES", "MAX_IN_FEATURES", "SEGMENTS", "LayerWeights"]

CODES = ("trellis", "split", "int8")
SEGMENTS = ("token", "block")
#: Above this many inputs the sum of 255 * 127 no longer fits 32 bits.
MAX_IN_FEATURES = (2**31 - 1) // (255 * 127)


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """Stored weights of one layer, in_features = K and out_features = N.

    Args:
        code: "trellis", "split" or "int8".
        bits_per_pair: 6, 7 or 8 for trellis, 7 for split, 16 for int8.
        in_features: K, at least 1.
        out_features: N, at least 1.
        packed: uint8 [ceil(N/64), ceil(K/4)*16*bits]; for int8 the weights, int8 [N, K].
        scale: float16 [N]; for split [N, 2*G] or [1, 2*G], per group the scales of the 4-bit and of the 3-bit field.
        offset: split only: float16 like `scale`; None means symmetric.
        input_scale: float16 [K] for trellis and int8, None for split.
        input_block: size of the Hadamard blocks on the inputs, a power of two that divides K.
        output_block: the same for the outputs and N; 1 for split and int8.
        group_size: split only: inputs per group, a multiple of 4; None is one group.
        activation_segment: "token" or "block": inputs that share one int8 activation scale (trellis only).

    Raises:
        OptionError: an unknown code, width or segment.
        ShapeError: an array has the wrong shape or dtype, or a block does not divide its axis.
    """

    code: str
    bits_per_pair: int
    in_features: int
    out_features: int
    packed: np.ndarray
    scale: np.ndarray
    offset: np.ndarray | None = None
    input_scale: np.ndarray | None = None
    input_block: int = 1
    output_block: int = 1
    group_size: int | None = None
    activation_segment: str = "token"

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise OptionError(f"the code must be one of {', '.join(CODES)}", self.code, "update septet or quantize again")
        if self.activation_segment not in SEGMENTS:
            raise OptionError("activation scales must be per token or block", self.activation_segment, "use token or block")
        widths = {"trellis": (6, 7, 8), "split": (7,), "int8": (16,)}[self.code]
        if self.bits_per_pair not in widths:
            raise OptionError(f"{self.code} must have {' or '.join(map(str, widths))} bits per pair", self.bits_per_pair, "fix the config")
        if self.in_features > MAX_IN_FEATURES:
            raise ShapeError(f"a layer must have at most {MAX_IN_FEATURES} inputs", self.in_features, "keep this layer unquantized")
        self._check_blocks()
        self._check_arrays()

    @property
    def padded_in_features(self) -> int:
        """K rounded up to whole tiles; int8 has no tiles."""
        return self.in_features if self.code == "int8" else -(-self.in_features // TILE_INPUTS) * TILE_INPUTS

    @property
    def segment(self) -> int:
        """Inputs that share one int8 activation scale."""
        if self.code == "split" and self.group_size is not None:
            return self.group_size
        if self.code == "trellis" and self.activation_segment == "block":
            return self.input_block
        return self.padded_in_features

    @property
    def groups(self) -> int:
        """Groups of inputs with their own scales: 1 unless `group_size` is set."""
        return 1 if self.group_size is None else -(-self.in_features // self.group_size)

    def _check_blocks(self) -> None:
        sizes = (("input_block", self.input_block, self.in_features), ("output_block", self.output_block, self.out_features))
        for name, block, features in sizes:
            if block < 1 or block & (block - 1) or features % block:
                raise ShapeError(f"{name} must be a power of two that divides {features}", block, "fix the config")
        if self.output_block != 1 and self.code != "trellis":
            raise ShapeError(f"{self.code} has no output rotation", self.output_block, "set output_block to 1")
        if self.group_size is not None and (self.code != "split" or self.group_size < 1 or self.group_size % TILE_INPUTS):
            raise ShapeError("group_size must be a multiple of 4, for the split code only", self.group_size, "fix the config")

    def _check_arrays(self) -> None:
        rows, columns = tile_grid(self.out_features, self.in_features)
        if self.code == "int8":
            _check_array("packed", self.packed, np.int8, [(self.out_features, self.in_features)])
        else:
            _check_array("packed", self.packed, np.uint8, [(rows, columns * tile_bytes(self.bits_per_pair))])
        if self.code == "split":
            shapes = [(self.out_features, 2 * self.groups), (1, 2 * self.groups)]
            _check_array("scale", self.scale, np.float16, shapes)
            if self.offset is not None:
                _check_array("offset", self.offset, np.float16, [self.scale.shape])
            if self.input_scale is not None:
                raise ShapeError("split has no input_scale", list(self.input_scale.shape), "remove the tensor")
            return
        _check_array("scale", self.scale, np.float16, [(self.out_features,)])
        if self.input_scale is None:
            raise ShapeError(f"{self.code} must have an input_scale of {self.in_features} values", None, "load weight_input_scale")
        _check_array("input_scale", self.input_scale, np.float16, [(self.in_features,)])
        if self.offset is not None:
            raise ShapeError(f"{self.code} has no offset", list(self.offset.shape), "remove the tensor")


def _check_array(name: str, array: np.ndarray, dtype: type, shapes: list[tuple[int, ...]]) -> None:
    """Raise ShapeError unless `array` is C-contiguous with this dtype and one of these shapes."""
    if array.dtype == dtype and array.shape in shapes and array.flags.c_contiguous:
        return
    wanted = " or ".join(str(list(shape)) for shape in shapes)
    got = f"{array.dtype} {list(array.shape)}" + ("" if array.flags.c_contiguous else ", not contiguous")
    raise ShapeError(f"{name} must be contiguous {np.dtype(dtype)} {wanted}", got, "check in_features, out_features and bits_per_pair")
