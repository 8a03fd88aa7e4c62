"""What can be chosen when a checkpoint is quantized, and what of it stands in config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from septet.errors import OptionError
from septet.kernels.weights import SEGMENTS
from septet.quantize.ranges import METHODS
from septet.quantize.split import GRANULARITIES

__all__ = ["CALIBRATION_TOKENS", "FORMAT_VERSION", "HEADS", "QuantizeOptions", "allocation_of"]

FORMAT_VERSION = 0
HEADS = ("int8", "trellis", "keep")
_BITS_PER_PAIR = {"trellis": {3.0: 6, 3.5: 7, 4.0: 8}, "split": {3.5: 7}}
#: How many tokens each effort calibrates with, unless told otherwise.
CALIBRATION_TOKENS = (0, 8_192, 16_384, 32_768)
#: More would not help, and the text must fit into memory.
_MOST_CALIBRATION_TOKENS = 1 << 24


def allocation_of(bits_per_weight: float) -> str:
    """The allocation that an average asks for: "uniform" where one width for all layers gives it, else "measured"."""
    return "uniform" if bits_per_weight in _BITS_PER_PAIR["trellis"] else "measured"


@dataclass(frozen=True)
class QuantizeOptions:
    """Options of a quantization run; together with the source they decide every byte.

    Args:
        code: "trellis" or "split", for the linear layers.
        bits_per_weight: average over the linear layers, without scales: 3.0 to 4.0 for trellis, 3.5 for split.
        head: "int8", "trellis" or "keep", for the output head and an embedding tied to it.
        activations: "int8" or "float", the default of the reader's products.
        activation_scale: "token" or "block".
        rotation_block: largest Hadamard block, a power of two.
        seed: of the random signs and of drawn text, below 2^32.
        symmetric: split without offsets.
        granularity: split scales per "channel", "group" or "tensor".
        group_size: inputs per group, a multiple of 4.
        range_method: of split: "mse", "minmax" or "minmax_shared".
        max_shard_bytes: of one output file.
        effort: 0 plain rounding; 1 error feedback; 2 and 3 also what errors matter for the model's predictions, and how far
            inputs have moved (code split: error feedback with inputs weighed by what matters).
        calibration: the text for efforts above 0: "self" (the model writes it), or "sha256:..." of the text given; else "none".
        calibration_tokens: about how many tokens to calibrate with; 0 is the effort's own number.
        allocation: "uniform": all layers have the same width; "measured": 6, 7 or 8 bits per pair for each group of layers, so that
            the average is `bits_per_weight` and the expected loss is least.

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
    effort: int = 0
    calibration: str = "none"
    calibration_tokens: int = 0
    allocation: str = "uniform"

    def __post_init__(self) -> None:
        known = {
            "code": tuple(_BITS_PER_PAIR),
            "head": HEADS,
            "activations": ("int8", "float"),
            "activation_scale": SEGMENTS,
            "granularity": GRANULARITIES,
            "range_method": METHODS,
            "allocation": ("uniform", "measured"),
            "effort": tuple(range(len(CALIBRATION_TOKENS))),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise OptionError(f"{name} must be one of {', '.join(map(str, values))}", getattr(self, name), "correct the option")
        self._check_bits()
        self._check_calibration()
        if self.rotation_block < 1 or self.rotation_block & (self.rotation_block - 1):
            raise OptionError("rotation_block must be a power of two", self.rotation_block, "use 256")
        if self.group_size < 4 or self.group_size % 4:
            raise OptionError("group_size must be a multiple of 4", self.group_size, "use 128")
        if not 0 <= self.seed < 1 << 32:
            raise OptionError("seed must be in 0..4294967295", self.seed, "use 0")
        if self.max_shard_bytes < 1:
            raise OptionError("max_shard_bytes must be positive", self.max_shard_bytes, "use 5000000000")

    def _check_bits(self) -> None:
        widths = _BITS_PER_PAIR[self.code]
        least, most = min(widths), max(widths)
        if not least <= self.bits_per_weight <= most:
            allowed = f"{least} to {most}" if least < most else str(least)
            raise OptionError(f"bits of code {self.code} must be {allowed}", self.bits_per_weight, "correct the option")
        if self.allocation == "uniform" and self.bits_per_weight not in widths:
            allowed = ", ".join(map(str, widths))
            raise OptionError(f"bits of uniform layers must be one of {allowed}", self.bits_per_weight, "use allocation measured")
        if self.allocation == "measured" and self.code != "trellis":
            raise OptionError("allocation measured is for code trellis only", self.code, "leave one of the two options out")

    def _check_calibration(self) -> None:
        if self.effort and self.code == "split" and self.range_method != "mse":
            raise OptionError("efforts above 0 find ranges of split by themselves", self.range_method, "use effort 0, or range_method mse")
        if self.calibration not in ("none", "self") and not self.calibration.startswith("sha256:"):
            raise OptionError("calibration must be none, self or sha256:...", self.calibration, "correct the option")
        if (self.effort > 0) != (self.calibration != "none"):
            got = f"effort {self.effort} with calibration {self.calibration}"
            raise OptionError("efforts above 0 and calibration need each other", got, "use effort 0 with calibration none")
        if not 0 <= self.calibration_tokens <= _MOST_CALIBRATION_TOKENS:
            raise OptionError(f"calibration_tokens must be in 0..{_MOST_CALIBRATION_TOKENS}", self.calibration_tokens, "leave it out")

    @property
    def bits_per_pair(self) -> int:
        """6, 7 or 8 for all layers; before widths are chosen layer by layer, a middle one."""
        return _BITS_PER_PAIR[self.code].get(self.bits_per_weight, 7)

    @property
    def tokens(self) -> int:
        """How many tokens to calibrate with."""
        return self.calibration_tokens or CALIBRATION_TOKENS[self.effort]

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
