"""Pieces of a fused group dealt out to GPUs, which work at the same time; what becomes of a piece does not depend on where that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from septet.quantize_gpu.devices import aside, on_devices, on_side_streams, wait_for_side_stream
from septet.quantize_gpu.pieces import Coded, Piece
from septet.quantize_gpu.statistics import CodedInputs, InputMetric, moved_by
from septet.quantize_gpu.work import Prepared, Work

__all__ = ["Share", "factorize", "run", "share"]

#: Rows that a GPU multiplies by the drift in the time that another one takes to factorize the Hessian: 7 to 16 thousand for 4096 to 28672
#: inputs, reckoned from a profile (docs/log.md).
_ROWS_MEANWHILE = 8192
#: From so many rows for each input on, the drift and the inverse Hessian are multiplied first, which is as much work as to multiply by
#: both as many rows as there are inputs; then every row is multiplied once instead of twice.
_ROWS_PER_INPUT = 2


@dataclass(frozen=True, eq=False)
class Share:
    """What one GPU does of a group: what it works with, and its pieces."""

    work: Work
    prepared: Prepared


def share(work: Work, pieces: list[Piece], helpers: Sequence[str]) -> list[Share]:
    """Deal out pieces, neighbours to one GPU, to `work`'s own and to helpers, of which each gets about the same; and prepare them."""
    devices, home = [work.device, *helpers[: len(pieces) - 1]], str(work.weights[0].device)
    rows = np.cumsum([0] + [len(piece) for piece in pieces])
    owner = np.minimum((rows[:-1] + rows[1:]) * len(devices) // (2 * rows[-1]), len(devices) - 1)
    # The first one has some in any case, since statistics come together there.
    shares = [[piece for piece, number in zip(pieces, owner - owner[0]) if number == own] for own in range(len(devices))]

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
    drifts = [_sent(coded.drift, one.work.device) for one in shares]
    rows = sum(len(piece) for one in shares for piece in one.prepared.pieces())
    combined = coded.drift is not None and rows > _ROWS_PER_INPUT * len(coded.drift)
    calls: list[tuple[str, Callable, Any]] = [(first.work.device, CodedInputs.metric, coded)]
    if coded.drift is not None and not combined:
        theirs = first.prepared.pieces()
        for number, (one, drift) in enumerate(zip(others, drifts[1:])):
            calls.append((one.work.device, _multiply, (first, theirs[number :: len(others)], one, drift)))
    metric = on_devices(calls)[0]
    for one in shares:
        wait_for_side_stream(one.work.device)
    metrics = [metric, *(metric.to(one.work.device) for one in others)]
    for one, drift in zip(metrics, drifts):
        one.drift = None if metric.known is None else drift
        if combined:
            one.combine()
    return metrics


def _sent(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """A tensor on a device, perhaps itself; in the side stream there, since the device's own one has other things to do."""
    if tensor is None or tensor.device == torch.device(device):
        return tensor
    with on_side_streams(device):
        there = tensor.to(device)
    if there.is_cuda:
        there.record_stream(torch.cuda.current_stream(device))
    return there


def _multiply(item: tuple[Share, list[Piece], Share, torch.Tensor]) -> None:
    """Find `Prepared.moved` of pieces of the first share, and of the second one's own, on that one's GPU, where the drift is.

    So many that both have about the same left to do when the Hessian has been factorized.
    """
    first, theirs, own, drift = item
    wait_for_side_stream(own.work.device)
    taken, rows = _as_many(first.prepared, theirs)
    # Not in the first GPU's own stream, which has the factorization to do.
    with on_side_streams(first.work.device):
        here = [one.to(own.work.device) for one in rows]
    moved = moved_by(drift, here)
    first.prepared.moved.update(zip(taken, [_sent(one, first.work.device) for one in moved]))
    taken, rows = _as_many(own.prepared, own.prepared.pieces())
    own.prepared.moved.update(zip(taken, moved_by(drift, rows)))


def _as_many(prepared: Prepared, pieces: list[Piece]) -> tuple[list[Piece], list[torch.Tensor]]:
    """The first of some pieces, half of `_ROWS_MEANWHILE` or fewer, and what is rotated of them."""
    rotated = dict(zip(prepared.pieces(), prepared.rotated()))
    rows = np.cumsum([len(piece) for piece in pieces])
    taken = pieces[: int((rows <= _ROWS_MEANWHILE // 2).sum())]
    return taken, [rotated[piece] for piece in taken]


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
