"""Quantize a whole checkpoint, one group of layers at a time, in memory bounded by the largest group.

Everything happens in OUT.partial (see `workspace`); OUT appears complete or not at all. The bytes depend on the source, the
options and the version of septet alone (and, with calibration, on the kind of device): not on threads, the clock, or on how often the
run was interrupted.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from septet import __version__
from septet.checkpoint.directory import CONFIG_NAME, ModelDirectory, open_directory, read_json
from septet.checkpoint.filling import Progress, Run, fill
from septet.checkpoint.integrity import HASHES_NAME, sha256_of_file
from septet.checkpoint.jobs import Calibration, Quantizer
from septet.checkpoint.options import QuantizeOptions
from septet.checkpoint.source import is_gguf
from septet.checkpoint.widths import choose_widths
from septet.checkpoint.workspace import Workspace, writing
from septet.errors import CheckpointError, OptionError, UnsupportedModelError
from septet.model import LayerPlan

__all__ = ["Hooks", "Progress", "quantize_checkpoint"]


@dataclass(frozen=True)
class Hooks:
    """What the caller brings along.

    Args:
        plan: (opened source, options) -> layers to quantize; those of one group are done together.
        progress: called with every Progress.
        convert_gguf: (file, directory) -> None: writes a Hugging Face directory; needed for .gguf sources.
        calibrate: (opened source, layers, folder) -> calibration; needed when the options ask for one. The folder is for what it wants to
            find again after an interruption; it goes away with OUT.partial.
        quantizer: who quantizes groups of layers, for instance on a GPU; None: NumPy and the native encoder.
    """

    plan: Callable[[ModelDirectory, QuantizeOptions], list[LayerPlan]]
    progress: Callable[[Progress], None] = lambda event: None
    convert_gguf: Callable[[Path, Path], None] | None = None
    calibrate: Callable[[ModelDirectory, list[LayerPlan], Path], Calibration] | None = None
    quantizer: Quantizer | None = None


def quantize_checkpoint(source: Path, out: Path, options: QuantizeOptions, hooks: Hooks, resume: bool = False, threads: int = 0) -> bool:
    """Quantize a Hugging Face directory or a .gguf file into a new directory.

    Args:
        source: directory with config.json and safetensors shards, or a .gguf file.
        out: must not exist, unless `resume`.
        options: what to make.
        hooks: how layers are found, who hears of progress, who reads .gguf.
        resume: go on with an interrupted run; a finished one is left as it is.
        threads: 0 is the default number; the result does not depend on it.

    Returns:
        False when there was nothing left to do.

    Raises:
        CheckpointError: the source is damaged, or OUT cannot be written. What has been done stays in OUT.partial.
        CodeRangeError: a weight is not finite or too large.
        UnsupportedModelError: the source is quantized already.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        return _check_existing(source, out, options, resume)
    made_from = {"septet_version": __version__, "options": options.as_json(), "source": _identify(source)}
    workspace = Workspace(out, made_from | {"changed": _change_times(source)}, resume)
    try:
        if workspace.was_complete(made_from):
            workspace.finish()
            return True
        directory = _source_directory(source, workspace, hooks)
        layers = hooks.plan(directory, options)
        calibration = _calibration(directory, layers, options, hooks, workspace.calibration)
        layers = choose_widths(directory, layers, options, calibration)
        fill(Run(workspace, directory, options, threads, hooks.progress, calibration, hooks.quantizer), layers, made_from)
        workspace.finish()
    finally:
        workspace.close()
    hooks.progress(Progress("finish", out.name))
    return True


def _calibration(
    directory: ModelDirectory, layers: list[LayerPlan], options: QuantizeOptions, hooks: Hooks, folder: Path
) -> Calibration | None:
    """What the options ask for."""
    if options.calibration == "none":
        return None
    if hooks.calibrate is None:
        raise OptionError(
            "calibration must have somebody to run the model", options.calibration, "use `septet quantize`, or calibration none"
        )
    with writing(folder):
        folder.mkdir(exist_ok=True)
    return hooks.calibrate(directory, layers, folder)


def _check_existing(source: Path, out: Path, options: QuantizeOptions, resume: bool) -> bool:
    """OUT exists: fine when resuming a run that has finished with the same source and options."""
    if not resume:
        raise CheckpointError(f"{out} must not exist", "something there", "choose another place, delete it, or use --resume")
    if not (out / HASHES_NAME).is_file():
        raise CheckpointError(f"{out} must be a checkpoint that septet made", f"no {HASHES_NAME} in it", "choose another place")
    hashes = read_json(out / HASHES_NAME)
    made = hashes.get("options")
    wanted = options.as_json()
    if made != wanted:
        differing = sorted(key for key in wanted if not isinstance(made, dict) or made.get(key) != wanted[key])
        raise CheckpointError(f"{out} must have been made with the same options", f"other {', '.join(differing)}", "choose another place")
    if hashes.get("source") != _identify(source):
        raise CheckpointError(f"{out} must have been made from {source}", "another source", "choose another place")
    return False


def _identify(source: Path) -> dict[str, object]:
    """What tells one source from another: hashes, no paths or dates."""
    if is_gguf(source):
        if not source.is_file():
            raise CheckpointError(f"{source} must be a file", "nothing there", "check the path")
        return {"kind": "gguf", "name": source.name, "sha256": sha256_of_file(source)}
    directory = open_directory(source)
    headers = {name: file.header_sha256 for name, file in directory.files.items()}
    return {"kind": "huggingface", "config": sha256_of_file(source / CONFIG_NAME), "headers": headers}


def _change_times(source: Path) -> dict[str, int]:
    """When the weights were last written: for the journal only, so that a run is not continued with other weights."""
    files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
    return {file.name: file.stat().st_mtime_ns for file in files}


def _source_directory(source: Path, workspace: Workspace, hooks: Hooks) -> ModelDirectory:
    """The source as a Hugging Face directory; a .gguf file is converted into one inside the workspace."""
    if is_gguf(source):
        converted = workspace.scratch
        if not converted.exists():
            if hooks.convert_gguf is None:
                raise UnsupportedModelError("a .gguf source must come with a converter", "none", "install septet[gguf]")
            hooks.progress(Progress("convert", source.name))
            unfinished = converted.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            with writing(unfinished):
                hooks.convert_gguf(source, unfinished)
                unfinished.rename(converted)
        source = converted
    directory = open_directory(source)
    quantized = directory.config.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedModelError("the source must be unquantized", f"weights quantized with {method}", "start from the original model")
    return directory
