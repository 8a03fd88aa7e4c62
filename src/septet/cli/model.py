"""Loading a model for the commands that let it write: through the native engine, or transformers without its bars and hints."""

from __future__ import annotations

from pathlib import Path

from septet.cli.device import check_device, devices_of
from septet.cli.options import Activations, EngineChoice
from septet.cli.output import note, quiet_libraries
from septet.errors import OptionError, SeptetError

__all__ = ["load"]


def load(directory: Path, activations: Activations | None, engine: EngineChoice, device: str = "cpu") -> tuple:
    """(model, tokenizer) of `septet.generate.load`; a line on stderr says why "auto" goes through transformers."""
    from septet import generate

    if len(devices_of(device)) > 1:
        raise OptionError("a model runs on one device", device, "name one of them; only quantizing takes several")
    check_device(device)
    if engine is EngineChoice.transformers or device != "cpu":
        quiet_libraries()
    return generate.load(directory, activations and activations.value, engine.value, _note_fallback, device)


def _note_fallback(reason: SeptetError) -> None:
    note(f"note: running through transformers: {reason.requirement}, got {reason.got}")
    quiet_libraries()
