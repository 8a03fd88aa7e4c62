"""What a plan says about one layer: which matrix it is, and how it will be stored. Models make plans, checkpoints carry them out."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PlannedLayer"]


@dataclass(frozen=True)
class PlannedLayer:
    """One layer to quantize.

    Args:
        name: module name; its weight is `<name>.weight` in the source and in the result.
        shape: (out_features, in_features) as the model's config wants it.
        code: "trellis", "split" or "int8".
        bits_per_pair: 6, 7, 8, or 16 for int8.
        role: "linear" or "head".
        tied: modules that use the same matrix and are not stored.
        transposed: whether the source holds it as [in_features, out_features] (Conv1D).
    """

    name: str
    shape: tuple[int, int]
    code: str
    bits_per_pair: int
    role: str = "linear"
    tied: tuple[str, ...] = ()
    transposed: bool = False

    @property
    def key(self) -> str:
        """The weight's key."""
        return f"{self.name}.weight"

    def config(self) -> dict[str, object]:
        """What of it stands in the layer's entry of config.json, beside `QuantizedTensor.config`."""
        described: dict[str, object] = {"role": self.role}
        if self.tied:
            described["tied"] = list(self.tied)
        if self.transposed:
            described["transposed"] = True
        return described
