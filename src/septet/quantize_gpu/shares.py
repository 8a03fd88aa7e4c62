"""Pieces of a fused group dealt out to GPUs, which work at the same time; what becomes of a piece does not depend on where that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from septet.quantize_gpu.devices import aside, on_devices, on_side_streams, wait_for_side_stream
from septet.quantize_gpu.pieces import Coded, Piece, Prepared, Work
from septet.quantize_gpu.statistics import CodedInputs, InputMetric, moved_by

__all__ = ["Share", "factorize", "run", "share"]

#: Rows that a GPU multiplies by the drift in the time that another one takes to factorize the Hessian: 7 to 16 thousand for 4096 to 28672
#: inputs (docs/log.md).
_ROWS_MEANWHILE = 8192


@dataclass(frozen=True, eq=False)
class Share:
    """What one GPU does of a group."""

    work: Work
    prepared: Prepared


def share(work: Work, pieces: list[Piece], helpers: Sequence[str]) -> list[Share]:
    """Deal out pieces, neighbours to one GPU, to `work`'s own and to helpers, of which each gets about the same; and prepare them."""
    devices, home = [work.device, *helpers[: len(pieces) - 1]], str(work.weights[0].device)
    rows = np.cumsum([0] + [piece.rows.stop - piece.rows.start for piece in pieces])
    owner = np.minimum((rows[:-1] + rows[1:]) * len(devices) // (2 * rows[-1]), len(devices) - 1)
    shares = [[piece for piece, number in zip(pieces, owner) if number == own] for own in range(len(devices))]

    def prepare(item: tuple[str, list[Piece]]) -> Share:
        device, part = item
        with aside(home, device):
            own = work if device == work.device else work.to(device)
            return Share(own, own.prepare(part))

    return on_devices([(device, prepare, (device, part)) for device, part in zip(devices, shares) if part])


def factorize(coded: CodedInputs, shares: list[Share]) -> list[InputMetric]:
    """The metric of a group's inputs for each share, on its GPU; what is known of them is used up.

    The first GPU factorizes. The others multiply rows by the drift meanwhile, their own and some of the first one's.
    """
    first, *others = shares
    if not others:
        return [coded.metric()]
    # Before the factorization is sent: copies would wait for it.
    drifts = [None if coded.drift is None else coded.drift.to(one.work.device, copy=True) for one in others]
    calls: list[tuple[str, Callable, Any]] = [(first.work.device, CodedInputs.metric, coded)]
    for number, (one, drift) in enumerate(zip(others, drifts)):
        if drift is not None:
            calls.append((one.work.device, _multiply, (first, one, drift, range(number, len(first.prepared.pieces), len(others)))))
    metric = on_devices(calls)[0]
    wait_for_side_stream(first.work.device)
    return [metric, *(metric.to(one.work.device, drift) for one, drift in zip(others, drifts))]


def _multiply(item: tuple[Share, Share, torch.Tensor, Sequence[int]]) -> None:
    """Find `Prepared.moved` of pieces of the first share, with the given numbers, and of the second one's own, on that one's GPU.

    So many that both have about the same left to do when the Hessian has been factorized.
    """
    first, own, drift, taken = item
    left = _ROWS_MEANWHILE // 2
    for number in taken:
        rows = first.prepared.rotated[number][0]
        left -= len(rows)
        if left < 0:
            break
        # The first GPU's own stream has the factorization to do.
        with on_side_streams(first.work.device):
            there = rows.to(own.work.device)
        moved = moved_by(drift, there)
        with on_side_streams(first.work.device):
            first.prepared.moved[number] = moved.to(first.work.device)
    left = _ROWS_MEANWHILE // 2
    for number, (rows, _) in enumerate(own.prepared.rotated):
        left -= len(rows)
        if left < 0:
            break
        own.prepared.moved[number] = moved_by(drift, rows)


def run(shares: list[Share], metrics: list[InputMetric]) -> list[Coded]:
    """What becomes of all pieces, in order.

    Args:
        shares: their rotated weights are used up.
        metrics: what is known of the inputs, on the GPU of each share; used up.
    """

    def finish(item: tuple[Share, InputMetric]) -> list[Coded]:
        one, metric = item
        return one.work.run(one.prepared, metric)

    calls = [(one.work.device, finish, (one, metric)) for one, metric in zip(shares, metrics)]
    return [coded for part in on_devices(calls) for coded in part]
