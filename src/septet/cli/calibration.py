"""What `--effort` and `--calibration` mean: text from a file or from the model itself, and what is found out on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from septet.cli.device import machine_of
from septet.cli.texts import hash_of_text, read_spread

if TYPE_CHECKING:
    import torch

    from septet.calibration import Calibrator, Machine, Sensitivity
    from septet.checkpoint import QuantizeOptions
    from septet.checkpoint.directory import ModelDirectory
    from septet.checkpoint.stream import Progress
    from septet.model import LayerPlan

__all__ = ["SENSITIVITY_CONTEXT", "calibrate_with", "calibration_name", "write_windows"]

_CONTEXT = 512
#: Sensitivities are measured on the beginnings of the windows; half of the tokens do.
SENSITIVITY_CONTEXT = 256


def calibration_name(choice: str) -> str:
    """What stands in the options for a choice: "none", "self", or the hash of the text.

    Args:
        choice: "none", "self" or the path of a text file.

    Raises:
        OptionError: the file is not there, or not UTF-8.
    """
    if choice in ("none", "self"):
        return choice
    return f"sha256:{hash_of_text(Path(choice))}"


def calibrate_with(
    choice: str, options: QuantizeOptions, threads: int, show: Callable[[Progress], None], device: str = "cpu"
) -> Callable[[ModelDirectory, list[LayerPlan], Path], Calibrator]:
    """The hook `calibrate` of a quantization run; text and sensitivities of an interrupted run are found again.

    Args:
        choice: "self" or the path of a text file.
        options: of the run.
        threads: 0 is the default number; the result does not depend on it.
        show: called while the model writes and is measured.
        device: as `check_device` accepts it; where the model runs.
    """

    def calibrate(directory: ModelDirectory, layers: list[LayerPlan], folder: Path) -> Calibrator:
        import torch

        from septet import loading
        from septet.calibration import Calibrator
        from septet.calibration.kept import load_array, save_array

        model, machine = loading.load_model(directory.path), machine_of(threads, device)
        context = min(_CONTEXT, getattr(model.config, "max_position_embeddings", None) or _CONTEXT)
        shape = -(-options.tokens // context), context
        kept = folder / "windows.npy"
        if not kept.is_file():
            windows = write_windows(model, shape, options.seed, machine, show) if choice == "self" else _read(choice, model, shape)
            save_array(kept, windows.numpy())
        windows = torch.from_numpy(load_array(kept))
        sensitivity = None
        if options.effort >= 2:
            beginnings = windows[:, :SENSITIVITY_CONTEXT].contiguous()
            sensitivity = _measured(model, layers, beginnings, options.seed, machine, folder, show)
        return Calibrator(model, layers, windows, machine, sensitivity)

    return calibrate


def _measured(
    model: torch.nn.Module,
    layers: list[LayerPlan],
    windows: torch.Tensor,
    seed: int,
    machine: Machine,
    folder: Path,
    show: Callable[[Progress], None],
) -> Sensitivity:
    """The sensitivity of a model's layers, kept in a folder."""
    from septet.calibration import Sensitivity, measure
    from septet.checkpoint.stream import Progress

    found, complete = Sensitivity(folder, beside=machine.is_gpu), folder / "complete.npy"
    if not complete.is_file():
        show(Progress("measure", "forward"))

        def measured(done: int, total: int) -> None:
            show(Progress("measure", f"block {done} of {total}"))

        measure(model, layers, windows, seed, machine, found, measured)
        found.seal(complete)
    return found


def _read(choice: str, model: torch.nn.Module, shape: tuple[int, int]) -> torch.Tensor:
    """Windows from a text, evenly spread over it; a large one is not read whole."""
    import torch

    from septet import loading
    from septet.evaluation.windows import cut_windows

    count, context = shape
    text = read_spread(Path(choice), count * context)
    tokens = cut_windows(loading.load_tokenizer(Path(model.name_or_path)), text, context, "all").tokens
    if len(tokens) <= count:
        return tokens
    return tokens[torch.arange(count) * len(tokens) // count]


def write_windows(
    model: torch.nn.Module, shape: tuple[int, int], seed: int, machine: Machine, show: Callable[[Progress], None]
) -> torch.Tensor:
    """Windows that the model writes.

    Args:
        model: a causal language model.
        shape: (windows, tokens of each).
        seed: of the draws.
        machine: where; the result does not depend on the number of threads.
        show: called after some of them.

    Returns:
        int64 of that shape.
    """
    from septet.calibration import sample_windows
    from septet.checkpoint.stream import Progress

    count, context = shape
    config = model.config
    ends = config.eos_token_id
    end = ends[0] if isinstance(ends, list) and ends else ends
    start = next((token for token in (config.bos_token_id, end) if isinstance(token, int)), 0)
    show(Progress("sample", f"{count} windows of {context} tokens"))
    return sample_windows(model, count, context, start, seed, machine)
