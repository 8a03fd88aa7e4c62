"""Pieces of a fused group dealt out to GPUs, which work at the same time; what becomes of a piece does not depend on where that is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from septet.quantize_gpu.devices import aside, on_devices, on_side_streams, side_stream_waits, wait_for_side_stream
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

    The first GPU factorizes. The others make room for a copy meanwhile, and multiply rows by the drift, their own and some of the first
    one's.
    """
    first, *others = shares
    drifts = [_sent(coded.drift, one.work.device) for one in shares]
    rows = sum(len(piece) for one in shares for piece in one.prepared.pieces())
    combined = coded.drift is not None and rows > _ROWS_PER_INPUT * len(coded.drift)
    calls: list[tuple[str, Callable, Any]] = [(first.work.device, CodedInputs.metric, coded)]
    theirs = first.prepared.pieces()
    for number, (one, drift) in enumerate(zip(others, drifts[1:])):
        multiplied = None if drift is None or combined else (first, theirs[number :: len(others)], one, drift)
        calls.append((one.work.device, _meanwhile, (coded.hessian, one, multiplied)))
    metric, *rooms = on_devices(calls)
    metrics = [metric, *_copies(metric, shares, rooms)]
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


def _meanwhile(item: tuple[torch.Tensor | None, Share, tuple | None]) -> torch.Tensor | None:
    """Make room for a copy of what becomes of a matrix, on a share's GPU; then `_multiply`, with its arguments, if there are any."""
    matrix, own, multiplied = item
    # To find that much memory takes up to a tenth of a second, which nobody waits for here.
    room = None if matrix is None else torch.empty_like(matrix, device=own.work.device)
    # The side stream will fill it, and has brought the drift.
    side_stream_waits(own.work.device)
    wait_for_side_stream(own.work.device)
    if multiplied is not None:
        _multiply(multiplied)
    return room


def _copies(metric: InputMetric, shares: list[Share], rooms: list[torch.Tensor | None]) -> list[InputMetric]:
    """Of the first share's metric, for the others; `Work.run` waits until they have left before it uses the metric up."""
    there, *others = [one.work.device for one in shares]
    wait_for_side_stream(there)
    side_stream_waits(there)
    copies = []
    for device, room in zip(others, rooms):
        # Not behind what either GPU is doing with rows.
        with on_side_streams(there, device):
            copies.append(metric.to(room))
        wait_for_side_stream(device)
    return copies


def _multiply(item: tuple[Share, list[Piece], Share, torch.Tensor]) -> None:
    """Find `Prepared.moved` of pieces of the first share, and of the second one's own, on that one's GPU, where the drift is.

    So many that both have about the same left to do when the Hessian has been factorized.
    """
    first, theirs, own, drift = item
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
