"""The work list of a checkpoint: groups of layers to quantize together, then tensors to copy, each with the tensors it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from septet.checkpoint.directory import ModelDirectory
from septet.checkpoint.layout import OutputTensor
from septet.checkpoint.options import QuantizeOptions
from septet.checkpoint.tensor_file import FLOAT_DTYPES, StoredMatrix
from septet.errors import CheckpointError
from septet.model import LayerPlan
from septet.quantize import (
    GroupStatistics,
    QuantizedTensor,
    quantize_int8,
    quantize_split,
    quantize_split_with_feedback,
    quantize_trellis,
)
from septet.quantize.stored import stored_arrays
from septet.quantize.tensor import RowSource

__all__ = ["Calibration", "Job", "Quantizer", "list_jobs", "quantize_group", "quantize_job", "read_matrices", "source_key"]

_STORED_DTYPES = {"uint8": "U8", "int8": "I8", "float16": "F16"}


@dataclass(frozen=True)
class Job:
    """What is done and recorded at once.

    Args:
        name: unique in the run.
        layers: a fused group to quantize; empty for a copy.
        writes: the tensors it makes.
        source_bytes: how much it reads, for the progress display.
    """

    name: str
    layers: tuple[LayerPlan, ...]
    writes: tuple[OutputTensor, ...]
    source_bytes: int


class Calibration(Protocol):
    """Who knows what the layers of a model see; `septet.calibration.Calibrator` is one."""

    def statistics(self, layers: Sequence[LayerPlan]) -> GroupStatistics | None:
        """What is known of a group; None to round plainly. Groups are asked for in the order of the plan."""

    def forecast(self, layers: Sequence[LayerPlan]) -> GroupStatistics | None:
        """What is known of a group before anything is quantized, in any order; None where nothing is."""

    def take_over(self, layer: LayerPlan, quantized: QuantizedTensor) -> None:
        """Let later statistics see this layer's quantized weights."""


#: What is known of a group, found when it is asked for: once, and before anything is made of the group.
Statistics = Callable[[], GroupStatistics | None]
#: Quantizes layers that belong together; arguments and result are those of `quantize_group`, but for when statistics are asked for.
Quantizer = Callable[[Sequence[LayerPlan], Sequence[RowSource], QuantizeOptions, int, Statistics], Sequence[QuantizedTensor]]


def list_jobs(source: ModelDirectory, layers: list[LayerPlan], options: QuantizeOptions) -> list[Job]:
    """All jobs in the order of the plan, copies last.

    Args:
        source: the model to quantize.
        layers: what to quantize; those of one group share their inputs and become one job.
        options: of the run.

    Raises:
        CheckpointError: the source lacks a layer, or has it in another shape or in a dtype that cannot be quantized.
    """
    jobs, taken = [], set()
    groups: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        groups.setdefault(layer.group, []).append(layer)
    for group in groups.values():
        for layer in group:
            _check_layer(source, layer)
            taken |= {f"{name}.weight" for name in (layer.name, *layer.tied_names)}
        writes = tuple(tensor for layer in group for tensor in _outputs(layer, options))
        size = sum(source.entry(source_key(layer)).size_bytes for layer in group)
        jobs.append(Job(group[0].name, tuple(group), writes, size))
    for key in source.owners:
        if key not in taken:
            entry = source.entry(key)
            jobs.append(Job(f"copy {key}", (), (OutputTensor(key, entry.dtype, entry.shape),), entry.size_bytes))
    return jobs


def source_key(layer: LayerPlan) -> str:
    """Under which key the source has a layer's weight."""
    return f"{layer.source or layer.name}.weight"


def _check_layer(source: ModelDirectory, layer: LayerPlan) -> None:
    key = source_key(layer)
    if key not in source.owners:
        hint = "the checkpoint is incomplete, or its config.json belongs to another model"
        raise CheckpointError(f"the checkpoint must hold {key}", f"{len(source.owners)} other tensors", hint)
    entry = source.entry(key)
    wanted = layer.shape[::-1] if layer.kind == "conv1d" else layer.shape
    if entry.shape != wanted:
        hint = "config.json and the weights do not belong together; fetch both again"
        raise CheckpointError(f"{key} must have the shape {list(wanted)} that config.json asks for", list(entry.shape), hint)
    if entry.dtype not in FLOAT_DTYPES:
        hint = "start from the unquantized model"
        raise CheckpointError(f"{key} must have one of the dtypes {', '.join(FLOAT_DTYPES)}", entry.dtype, hint)


def _outputs(layer: LayerPlan, options: QuantizeOptions) -> list[OutputTensor]:
    """The tensors a layer is stored as."""
    entry = {
        "code": layer.code,
        "bits_per_pair": layer.bits_per_pair,
        "out_features": layer.shape[0],
        "in_features": layer.shape[1],
        "symmetric": options.symmetric,
        "scale_rows": 1 if options.granularity == "tensor" else layer.shape[0],
        "group_size": options.group_size if options.granularity == "group" else None,
    }
    arrays = stored_arrays(entry, layer.name)
    return [OutputTensor(f"{layer.name}.{part}", _STORED_DTYPES[dtype.name], shape) for part, (dtype, shape) in arrays.items()]


def quantize_job(
    source: ModelDirectory,
    job: Job,
    options: QuantizeOptions,
    threads: int,
    calibration: Calibration | None = None,
    quantizer: Quantizer | None = None,
) -> list[QuantizedTensor]:
    """Quantize the layers of a job, with error feedback where the calibration knows something; `quantize_group` does it by default."""
    matrices = read_matrices(source, job.layers)

    def statistics() -> GroupStatistics | None:
        return calibration.statistics(job.layers) if calibration is not None and job.layers[0].code != "int8" else None

    if quantizer is None:
        made = quantize_group(job.layers, matrices, options, threads, statistics())
    else:
        made = list(quantizer(job.layers, matrices, options, threads, statistics))
    if calibration is not None:
        for layer, quantized in zip(job.layers, made):
            calibration.take_over(layer, quantized)
    return made


def read_matrices(source: ModelDirectory, layers: Sequence[LayerPlan]) -> list[RowSource]:
    """The weights of layers, [N, K] each; most of them stay on disk until rows are asked for."""
    matrices: list[RowSource] = []
    for layer in layers:
        stored = StoredMatrix(source.file_of(source_key(layer)), source_key(layer))
        matrices.append(np.ascontiguousarray(stored[:].T) if layer.kind == "conv1d" else stored)
    return matrices


def quantize_group(
    layers: Sequence[LayerPlan],
    matrices: Sequence[RowSource],
    options: QuantizeOptions,
    threads: int = 0,
    statistics: GroupStatistics | None = None,
) -> list[QuantizedTensor]:
    """Quantize layers that belong together.

    Args:
        layers: one group of a plan.
        matrices: [N_i, K] each, arrays or anything that hands out rows as float32.
        options: how.
        threads: 0 is the default number; the result does not depend on it.
        statistics: of the group, for error feedback; None: plain rounding.

    Raises:
        CodeRangeError: a weight is not finite or too large.
    """
    names, code = [layer.name for layer in layers], layers[0].code
    if code == "int8":
        return [quantize_int8(matrix, name, options.rotation_block, options.seed) for matrix, name in zip(matrices, names)]
    if code == "split":
        chosen = options.symmetric, options.granularity, options.group_size
        if statistics is not None:
            known = statistics.inputs
            return [quantize_split_with_feedback(matrix[:], known, *chosen, threads, name) for matrix, name in zip(matrices, names)]
        return [quantize_split(matrix[:], *chosen, options.range_method, threads, name) for matrix, name in zip(matrices, names)]
    return quantize_trellis(list(matrices), names, layers[0].bits_per_pair, options.rotation_block, options.seed, threads, statistics)
