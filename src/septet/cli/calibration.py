"""What `--calibration` means: a text file, text that the model writes itself, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from septet.cli.eval import read_text

if TYPE_CHECKING:
    import torch

    from septet.calibration import Calibrator
    from septet.checkpoint import QuantizeOptions
    from septet.checkpoint.directory import ModelDirectory
    from septet.checkpoint.stream import Progress
    from septet.model import LayerPlan

__all__ = ["calibrate_with", "calibration_name"]

_CONTEXT = 512


def calibration_name(choice: str) -> str:
    """What stands in the options for a choice: "none", "self", or the hash of the text.

    Args:
        choice: "none", "self" or the path of a text file.

    Raises:
        OptionError: the file is not there, or not UTF-8.
    """
    if choice in ("none", "self"):
        return choice
    return f"sha256:{hashlib.sha256(read_text(Path(choice)).encode()).hexdigest()}"


def calibrate_with(
    choice: str, options: QuantizeOptions, threads: int, show: Callable[[Progress], None]
) -> Callable[[ModelDirectory, list[LayerPlan]], Calibrator]:
    """The hook `calibrate` of a quantization run.

    Args:
        choice: "self" or the path of a text file.
        options: of the run.
        threads: 0 is the default number; the result does not depend on it.
        show: called while the model writes.
    """

    def calibrate(directory: ModelDirectory, layers: list[LayerPlan]) -> Calibrator:
        from septet import loading
        from septet.calibration import Calibrator

        # While the model writes it runs as a whole; a text given is read by one block in float32 at a time.
        model = loading.load_model(directory.path, dtype="float32" if choice == "self" else "auto")
        context = min(_CONTEXT, getattr(model.config, "max_position_embeddings", None) or _CONTEXT)
        count = -(-options.calibration_tokens // context)
        make = _written if choice == "self" else _read
        return Calibrator(model, layers, make(choice, model, (count, context), options.seed, threads, show), threads)

    return calibrate


def _read(choice: str, model: object, shape: tuple[int, int], *_: object) -> torch.Tensor:
    """Windows from a text, evenly spread over it."""
    import torch

    from septet import loading
    from septet.evaluation.windows import cut_windows

    count, context = shape
    tokens = cut_windows(loading.load_tokenizer(Path(model.name_or_path)), read_text(Path(choice)), context, "all").tokens
    if len(tokens) <= count:
        return tokens
    return tokens[torch.arange(count) * len(tokens) // count]


def _written(choice: str, model: object, shape: tuple[int, int], seed: int, threads: int, show: Callable[[Progress], None]) -> torch.Tensor:
    """Windows that the model writes."""
    from septet.calibration import sample_windows
    from septet.checkpoint.stream import Progress

    count, context = shape
    config = model.config
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    start = next((token for token in (config.bos_token_id, end) if isinstance(token, int)), 0)
    show(Progress("sample", f"{count} windows of {context} tokens"))
    return sample_windows(model, count, context, start, seed, threads)
