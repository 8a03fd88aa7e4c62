"""The work inside OUT.partial: do every job that is not done, then write config.json, the companions and the hashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from septet.checkpoint.directory import CONFIG_NAME, ModelDirectory, companion_files, json_bytes
from septet.checkpoint.integrity import HASHES_NAME, crc32_of_tensor, crc32_text, hashes_of
from septet.checkpoint.jobs import Calibration, Job, Quantizer, list_jobs, quantize_job
from septet.checkpoint.layout import INDEX_NAME, Shard, index_of, plan_shards
from septet.checkpoint.options import FORMAT_VERSION, QuantizeOptions
from septet.checkpoint.tensor_file import open_tensor_file
from septet.checkpoint.workspace import Workspace
from septet.model import LayerPlan
from septet.quantize import QuantizedTensor
from septet.quantize.executors import workers
from septet.quantize.stored import stored_arrays

__all__ = ["Progress", "Run", "fill"]


@dataclass(frozen=True)
class Progress:
    """Something happened.

    Args:
        stage: "convert", "sample" (the model writes text), "measure" (which errors matter), "check" (jobs of an earlier run), "quantize",
            "copy" or "finish".
        name: the layer, tensor or file it is about.
        done_bytes: how much of the source has been worked off.
        total_bytes: of the source; 0 while unknown.
        relative_error: the largest one of the layers just quantized, otherwise None.
    """

    stage: str
    name: str
    done_bytes: int = 0
    total_bytes: int = 0
    relative_error: float | None = None


@dataclass(frozen=True)
class Run:
    """What stays the same during a run.

    Args:
        workspace: OUT.partial.
        source: the unquantized model.
        options: of the run.
        threads: 0 is the default number.
        progress: called with every Progress.
        calibration: for error feedback; None: plain rounding.
        quantizer: of groups of layers; None: `quantize_group`.
    """

    workspace: Workspace
    source: ModelDirectory
    options: QuantizeOptions
    threads: int
    progress: Callable[[Progress], None]
    calibration: Calibration | None = None
    quantizer: Quantizer | None = None


#: Tensor key -> shard and first byte in it.
_Places = dict[str, tuple[str, int]]


def fill(run: Run, layers: list[LayerPlan], made_from: dict) -> None:
    """Make all files of the checkpoint.

    Args:
        run: where and how.
        layers: what to quantize.
        made_from: goes into septet.json.
    """
    jobs = list_jobs(run.source, layers, run.options)
    shards = plan_shards([tensor for job in jobs for tensor in job.writes], run.options.max_shard_bytes)
    places = {key: (shard.name, offset) for shard in shards for key, offset in shard.offsets.items()}
    run.workspace.reserve(shards)
    _forget_damaged(run, jobs, shards)
    total, done = sum(job.source_bytes for job in jobs), 0
    with _Writer(run, places) as writer:
        for job in jobs:
            stage = "quantize" if job.layers else "copy"
            run.progress(Progress(stage, job.name, done, total))
            record = run.workspace.records.get(job.name)
            errors = [] if record is None else [entry["relative_error"] for entry in record["layers"].values()]
            if record is None and job.layers:
                errors = _quantize(run, job, writer)
            elif record is None:
                writer.settle()
                _copy(run, job, places)
            elif run.calibration is not None:
                for layer in job.layers:
                    run.calibration.take_over(layer, _read_quantized(run, job, layer, places))
            done += job.source_bytes
            run.progress(Progress(stage, job.name, done, total, max(errors, default=None)))
    _write_beside(run, jobs, shards)
    _write_hashes(run, shards, made_from)


def _quantize(run: Run, job: Job, writer: _Writer) -> list[float]:
    """Quantize the layers of a job and give them to the writer, who alone keeps them; returns their relative errors."""
    made = quantize_job(run.source, job, run.options, run.threads, run.calibration, run.quantizer)
    writer.put(job, made)
    return [quantized.relative_error for quantized in made]


def _forget_damaged(run: Run, jobs: list[Job], shards: list[Shard]) -> None:
    """Drop the record of every job whose tensors are not what was recorded."""
    files = {shard.name: open_tensor_file(run.workspace.path / shard.name) for shard in shards} if run.workspace.records else {}
    owners = {key: files[shard.name] for shard in shards for key in shard.offsets if files}
    for job in jobs:
        record = run.workspace.records.get(job.name)
        if record is None:
            continue
        run.progress(Progress("check", job.name))
        for tensor in job.writes:
            if crc32_of_tensor(owners[tensor.key], tensor.key) != record["crc32"].get(tensor.key):
                del run.workspace.records[job.name]
                break


class _Writer:
    """Writes and records what has been quantized; beside a GPU in a thread, while the next group is at work, and one job waits at most.

    At the end of a `with`, also after an error, it has written what it was given.
    """

    def __init__(self, run: Run, places: _Places) -> None:
        self._run, self._places = run, places
        self._thread, self._last = workers(beside=run.quantizer is not None), None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        self._thread.shutdown()
        if error_type is None:
            self.settle()

    def put(self, job: Job, made: list[QuantizedTensor]) -> None:
        """Write the tensors of a job.

        Raises:
            CheckpointError: those of the job before could not be written.
        """
        self.settle()
        self._last = self._thread.submit(self._write, job, made)

    def settle(self) -> None:
        """Wait until everything is on disk and recorded; raises like `put`."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def _write(self, job: Job, made: list[QuantizedTensor]) -> None:
        checksums: dict[str, str] = {}
        layers: dict[str, dict] = {}
        for layer, quantized in zip(job.layers, made):
            layers[layer.name] = quantized.config() | layer.config()
            for part, array in quantized.tensors().items():
                key = f"{layer.name}.{part}"
                checksums[key] = crc32_text(array)
                shard, offset = self._places[key]
                self._run.workspace.write(shard, [(offset, array)])
        self._run.workspace.record(job.name, crc32=checksums, layers=layers)


def _read_quantized(run: Run, job: Job, layer: LayerPlan, places: _Places) -> QuantizedTensor:
    """What an earlier run made of a layer, for a calibration that goes on behind it."""
    entry = run.workspace.records[job.name]["layers"][layer.name]
    arrays = {}
    for part, (dtype, shape) in stored_arrays(entry, layer.name).items():
        key = f"{layer.name}.{part}"
        arrays[part] = open_tensor_file(run.workspace.path / places[key][0]).read(key).view(dtype).reshape(shape)
    return QuantizedTensor(
        code=entry["code"],
        bits_per_pair=entry["bits_per_pair"],
        shape=layer.shape,
        packed=arrays["weight"],
        scale=arrays["weight_scale"],
        offset=arrays.get("weight_offset"),
        input_scale=arrays.get("weight_input_scale"),
        input_block=entry.get("input_block", 1),
        output_block=entry.get("output_block", 1),
        group_size=entry.get("group_size"),
    )


def _copy(run: Run, job: Job, places: _Places) -> None:
    """Copy one tensor, piece by piece, and record it."""
    key = job.writes[0].key
    shard, offset = places[key]
    checksum = "00000000"

    def pieces() -> Iterator[tuple[int, np.ndarray]]:
        nonlocal checksum
        position = offset
        for piece in run.source.file_of(key).pieces(key):
            checksum = crc32_text(piece, checksum)
            yield position, piece
            position += len(piece)

    run.workspace.write(shard, pieces())
    run.workspace.record(job.name, crc32={key: checksum}, layers={})


def _write_beside(run: Run, jobs: list[Job], shards: list[Shard]) -> None:
    """Write config.json, the index and the companions."""
    records = [run.workspace.records[job.name] for job in jobs]
    entry = run.options.config_entry()
    entry["layers"] = {name: layer for record in records for name, layer in record["layers"].items()}
    entry["crc32"] = {key: value for record in records for key, value in record["crc32"].items()}
    for name in companion_files(run.source.path):
        run.workspace.write_file(name, (run.source.path / name).read_bytes())
    if len(shards) > 1:
        run.workspace.write_file(INDEX_NAME, json_bytes(index_of(shards)))
    config = run.source.config | {"quantization_config": entry}
    if any(layer.source for job in jobs for layer in job.layers):
        config["tie_word_embeddings"] = False
    run.workspace.write_file(CONFIG_NAME, json_bytes(config))


def _write_hashes(run: Run, shards: list[Shard], made_from: dict) -> None:
    """Write septet.json, the last file."""
    run.progress(Progress("finish", HASHES_NAME))
    others = [CONFIG_NAME, *companion_files(run.source.path), *([INDEX_NAME] if len(shards) > 1 else ())]
    hashes = hashes_of(run.workspace.path, [shard.name for shard in shards], others)
    run.workspace.write_file(HASHES_NAME, json_bytes({"format_version": FORMAT_VERSION, **made_from, **hashes}))
