"""What kind of model a path names, from its name and config.json alone."""

from __future__ import annotations

from pathlib import Path

from septet.checkpoint.directory import CONFIG_NAME, read_json
from septet.errors import CheckpointError, UnsupportedModelError

__all__ = ["is_gguf", "is_septet", "read_config"]


def is_gguf(path: Path) -> bool:
    """Whether `path` names a GGUF file (by its ending; `read_config` and the loader check the content)."""
    return path.suffix.lower() == ".gguf"


def read_config(path: Path) -> dict:
    """Read `config.json` of a model directory.

    Args:
        path: a model directory.

    Returns:
        The JSON object.

    Raises:
        CheckpointError: the path, the file or the JSON object is missing or damaged.
        UnsupportedModelError: `path` is a file.
    """
    if path.is_file():
        hint = "name the directory that holds config.json"
        raise UnsupportedModelError("a model must be a Hugging Face directory or a .gguf file", f"the file {path}", hint)
    if not path.is_dir():
        raise CheckpointError("a model must be a local directory or .gguf file", f"{path}, which does not exist", "check the path")
    return read_json(path / CONFIG_NAME)


def is_septet(path: Path) -> bool:
    """Whether `path` is a directory that septet quantized.

    Raises:
        CheckpointError: it has no readable config.json.
        UnsupportedModelError: it is a file other than a .gguf.
    """
    if is_gguf(path):
        return False
    quantization = read_config(path).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "septet"
