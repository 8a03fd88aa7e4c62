"""Widths by layer for a checkpoint on disk: what is known of the groups is looked at one group at a time."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from septet.checkpoint import QuantizeOptions
from septet.checkpoint.directory import open_directory
from septet.checkpoint.widths import choose_widths
from septet.model import LayerPlan
from septet.quantize import GroupStatistics
from septet.quantize.allocation import expected_loss

OPTIONS = QuantizeOptions(bits_per_weight=3.3, allocation="measured")


class Forecasts:
    """Statistics out of thin air; knows how many of them were in memory at once."""

    def __init__(self, unknown: str = "") -> None:
        self.unknown, self.held, self.most = unknown, weakref.WeakSet(), 0

    def forecast(self, layers: Sequence[LayerPlan]) -> GroupStatistics | None:
        """Every layer of the first block matters more than those behind it."""
        if layers[0].name == self.unknown:
            return None
        inputs = layers[0].shape[1]
        matters = 100.0 if ".0." in layers[0].name else 1.0
        made = GroupStatistics(np.eye(inputs), None, tuple(matters * np.eye(layer.shape[0])[None] for layer in layers))
        self.held.add(made)
        self.most = max(self.most, len(self.held))
        return made


def test_statistics_of_one_group_are_in_memory_at_a_time(tmp_path: Path) -> None:
    directory = open_directory(checkpoints.write_model(tmp_path / "source"))
    layers = checkpoints.plan(directory, OPTIONS)
    forecasts = Forecasts()
    chosen = choose_widths(directory, layers, OPTIONS, forecasts)
    # While a group is forecast, the one before it may still be held.
    assert forecasts.most <= 2
    first, last = ({layer.bits_per_pair for layer in chosen if f"layers.{number}." in layer.name} for number in (0, 1))
    assert max(last) < max(first)


def test_without_all_forecasts_widths_are_spread(tmp_path: Path) -> None:
    directory = open_directory(checkpoints.write_model(tmp_path / "source"))
    layers = checkpoints.plan(directory, OPTIONS)
    evenly = choose_widths(directory, layers, OPTIONS, None)
    assert choose_widths(directory, layers, OPTIONS, Forecasts("model.layers.1.mlp.down_proj")) == evenly
    assert choose_widths(directory, layers, replace(OPTIONS, bits_per_weight=3.5, allocation="uniform"), None) == layers


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_whose_importance_is_not_known_do_not_spoil_a_forecast(bad: float) -> None:
    weight, outputs = np.ones((8, 8), np.float32), np.eye(8)[None]
    clean, damaged = outputs.copy(), outputs.copy()
    clean[0, 3, 3], damaged[0, 3, 3] = 0, bad
    losses = [expected_loss([weight], GroupStatistics(np.eye(8), None, (known,)), 1) for known in (clean, damaged)]
    assert losses[0] == losses[1] > 0
