"""Which width each group of layers gets, when they are not all the same."""

from __future__ import annotations

from dataclasses import replace

from septet.checkpoint.directory import ModelDirectory
from septet.checkpoint.jobs import Calibration, read_matrices
from septet.checkpoint.options import QuantizeOptions
from septet.model import LayerPlan
from septet.quantize.allocation import allocate, expected_loss

__all__ = ["choose_widths"]


def choose_widths(
    source: ModelDirectory, layers: list[LayerPlan], options: QuantizeOptions, calibration: Calibration | None
) -> list[LayerPlan]:
    """Give every group of linear layers a width so that their average is what the options ask for.

    Args:
        source: the unquantized model.
        layers: the plan.
        options: of the run; nothing is changed when its allocation is "uniform".
        calibration: knows what errors matter; without it widths are spread evenly over the model.

    Returns:
        The plan with other widths.
    """
    if options.allocation == "uniform":
        return layers
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        if layer.code == "trellis" and layer.role == "linear":
            groups.setdefault(layer.group, []).append(layer)
    sizes = [sum(layer.shape[0] * layer.shape[1] for layer in group) for group in groups.values()]
    losses: list[float] | None = []
    for group in groups.values():
        # One group's statistics at a time: those of all groups together are larger than the model.
        statistics = calibration.forecast(group) if calibration is not None else None
        if statistics is None:
            losses = None
            break
        losses.append(expected_loss([matrix[:] for matrix in read_matrices(source, group)], statistics, options.rotation_block))
    widths = dict(zip(groups, allocate(sizes, losses, options.bits_per_weight)))
    return [replace(layer, bits_per_pair=widths[layer.group]) if layer.group in widths else layer for layer in layers]
