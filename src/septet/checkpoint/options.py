"""What can be chosen when a checkpoint is quantized, and what of it stands in config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from septet.errors import OptionError
from septet.kernels.weights import SEGMENTS
from septet.quantize.ranges import METHODS
from septet.quantize.split import GRANULARITIES

__all__ = ["FORMAT_VERSION", "HEADS", "QuantizeOptions"]

FORMAT_VERSION = 0
HEADS = ("int8", "trellis", "keep")
_BITS_PER_PAIR = {"trellis": {3.0: 6, 3.5: 7, 4.0: 8}, "split": {3.5: 7}}


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of a quantization run; together with the source they decide every byte.

    Args:
        code: "trellis" or "split", for the linear layers.
        bits_per_weight: 3.0, 3.5 or 4.0 for trellis, 3.5 for split.
        head: "int8", "trellis" or "keep", for the output head and an embedding tied to it.
        activations: "int8" or "float", the default of the reader's products.
        activation_scale: "token" or "block".
        rotation_block: largest Hadamard block, a power of two.
        seed: of the random signs.
        symmetric: split without offsets.
        granularity: split scales per "channel", "group" or "tensor".
        group_size: inputs per group, a multiple of 4.
        range_method: of split: "mse", "minmax" or "minmax_shared".
        max_shard_bytes: of one output file.
        calibration: what error feedback is based on: "none" (plain rounding), "self" (text that the model writes), or "sha256:..." of
            the text given. Only for code trellis.
        calibration_tokens: about how many tokens to calibrate with.

    Raises:
        OptionError: a value is unknown.
    """

    code: str = "trellis"
    bits_per_weight: float = 3.5
    head: str = "int8"
    activations: str = "int8"
    activation_scale: str = "block"
    rotation_block: int = 256
    seed: int = 0
    symmetric: bool = False
    granularity: str = "channel"
    group_size: int = 128
    range_method: str = "mse"
    max_shard_bytes: int = 5_000_000_000
    calibration: str = "none"
    calibration_tokens: int = 32_768

    def __post_init__(self) -> None:
        known = {
            "code": tuple(_BITS_PER_PAIR),
            "head": HEADS,
            "activations": ("int8", "float"),
            "activation_scale": SEGMENTS,
            "granularity": GRANULARITIES,
            "range_method": METHODS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise OptionError(f"{name} must be one of {', '.join(values)}", getattr(self, name), "correct the option")
        widths = _BITS_PER_PAIR[self.code]
        if self.bits_per_weight not in widths:
            allowed = ", ".join(str(bits) for bits in widths)
            raise OptionError(f"bits of code {self.code} must be one of {allowed}", self.bits_per_weight, "correct the option")
        if self.rotation_block < 1 or self.rotation_block & (self.rotation_block - 1):
            raise OptionError("rotation_block must be a power of two", self.rotation_block, "use 256")
        if self.group_size < 4 or self.group_size % 4:
            raise OptionError("group_size must be a multiple of 4", self.group_size, "use 128")
        if self.max_shard_bytes < 1:
            raise OptionError("max_shard_bytes must be positive", self.max_shard_bytes, "use 5000000000")
        if self.calibration != "none" and self.code != "trellis":
            raise OptionError("calibration is for code trellis only", self.code, "leave one of the two options out")
        if self.calibration not in ("none", "self") and not self.calibration.startswith("sha256:"):
            raise OptionError("calibration must be none, self or sha256:...", self.calibration, "correct the option")
        if self.calibration_tokens < 1:
            raise OptionError("calibration_tokens must be positive", self.calibration_tokens, "use 32768")

    @property
    def bits_per_pair(self) -> int:
        """6, 7 or 8."""
        return _BITS_PER_PAIR[self.code][self.bits_per_weight]

    def as_json(self) -> dict[str, object]:
        """All options as JSON values."""
        return asdict(self)

    def config_entry(self) -> dict[str, object]:
        """The part of config.json's quantization_config that says how to read the checkpoint."""
        return {
            "quant_method": "septet",
            "format_version": FORMAT_VERSION,
            "code": self.code,
            "bits_per_weight": self.bits_per_weight,
            "head": self.head,
            "activations": self.activations,
            "activation_scale": self.activation_scale,
            "rotation_block": self.rotation_block,
            "seed": self.seed,
        }
