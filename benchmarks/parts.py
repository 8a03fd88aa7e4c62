"""Where the time of a quantizing run goes: wall seconds of its parts, each waited for, without the parts inside it.

Functions of the quantizer are replaced by ones that wait for the GPUs before and after; work in a thread of its own is counted apart for
each GPU, so those parts overlap each other, and the time for which the main thread waits for them is "shared". Waiting takes time itself,
and what would overlap does not: the sum is more than a run without it.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

__all__ = ["timed_parts"]

#: Where a function is looked up when it is called, and what it is shown as.
_PARTS = {
    "septet.cli.calibration:write_windows": "text",
    "septet.loading:load_model": "load model",
    "septet.calibration:measure": "sensitivity, rest",
    "septet.calibration.sensitivity:Chain.__init__": "sensitivity, chain",
    "septet.calibration.sensitivity:_head_gradients": "sensitivity, head",
    "septet.calibration.sensitivity:_Step.run": "sensitivity, backward",
    "septet.calibration.sensitivity:_Step._add": "sensitivity, sums",
    "septet.calibration.sensitivity:_Step.result": "sensitivity, means",
    "septet.calibration.kept:Sensitivity.put": "sensitivity, to host",
    "septet.calibration.kept:Sensitivity.settle": "sensitivity, waiting for the disk",
    "septet.calibration.calibrator:Calibrator._go_on": "statistics, new block",
    "septet.calibration.calibrator:Passes.__init__": "statistics, copies of a block",
    "septet.calibration.calibrator:Calibrator._collect": "statistics, passes",
    "septet.calibration.calibrator:InputSum.add": "sums of inputs",
    "septet.calibration.calibrator:Calibrator._known": "statistics, sensitivities from disk",
    "septet.calibration.calibrator:_weigh": "statistics, mixed",
    "septet.calibration.calibrator:Calibrator.take_over": "taken over",
    "septet.quantize_gpu.trellis:upload": "weights to the GPU",
    "septet.quantize_gpu.trellis:_measure": "norms",
    "septet.quantize_gpu.trellis:_quantize": "scales and the like",
    "septet.quantize_gpu.trellis:coded_inputs": "inputs rotated",
    "septet.quantize_gpu.trellis:factorize": "factorization",
    "septet.quantize_gpu.shares:_multiply": "targets, ahead",
    "septet.quantize_gpu.trellis:share": "shared, before the inputs are known",
    "septet.quantize_gpu.trellis:run": "shared",
    "septet.quantize_gpu.statistics:InputMetric.to": "copies for helpers",
    "septet.quantize_gpu.work:Work.prepare": "rotation",
    "septet.quantize_gpu.work:Work._correct": "targets",
    "septet.quantize_gpu.factorization:Decomposition.factor": "factor",
    "septet.quantize_gpu.work:Work._output_factors": "factors of outputs",
    "septet.quantize_gpu.work:encode_sheets": "encoding",
    "septet.quantize_gpu.work:encode_plainly": "encoding",
    "septet.quantize_gpu.work:Work._finished": "refit",
    "septet.quantize_gpu.trellis:_joined": "joined",
    "septet.checkpoint.filling:_Writer.settle": "waiting for the disk",
    "septet.checkpoint.filling:_write_hashes": "hashes",
}


class _Stack(threading.local):
    """Of each thread: seconds of parts inside the one at work."""

    def __init__(self) -> None:
        self.inside = [0.0]


@contextmanager
def timed_parts() -> Iterator[dict[str, float]]:
    """Count seconds until the end of the `with`, by part; parts of helpers begin with their GPU."""
    seconds: dict[str, float] = defaultdict(float)
    stack, main = _Stack(), threading.current_thread()

    def timed(function: Callable, part: str) -> Callable:
        @wraps(function)
        def call(*positional: Any, **named: Any) -> Any:
            alone = threading.current_thread() is not main
            _wait(alone)
            start = time.perf_counter()
            stack.inside.append(0.0)
            try:
                return function(*positional, **named)
            finally:
                _wait(alone)
                took = time.perf_counter() - start
                seconds[f"GPU {torch.cuda.current_device()}: {part}" if alone else part] += took - stack.inside.pop()
                stack.inside[-1] += took

        return call

    replaced = []
    for where, part in _PARTS.items():
        owner, name = _owner_of(where)
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, timed(getattr(owner, name), part))
    try:
        yield seconds
    finally:
        for owner, name, function in replaced:
            setattr(owner, name, function)


def _owner_of(where: str) -> tuple[Any, str]:
    module, _, path = where.partition(":")
    *classes, name = path.split(".")
    owner = importlib.import_module(module)
    for each in classes:
        owner = getattr(owner, each)
    return owner, name


def _wait(alone: bool) -> None:
    """For the thread's own GPU, or for all."""
    for gpu in [torch.cuda.current_device()] if alone else range(torch.cuda.device_count()):
        torch.cuda.synchronize(gpu)
