"""From a path to a model and its tokenizer, through transformers.

One door for everything that runs a model: a septet directory, an unquantized Hugging Face directory, or a `.gguf` file
(dequantized while it is read), so that rivals are judged by the same code. Only `resolve_source` fetches anything.
The files are checked before transformers sees them, because its own errors speak of code, not of files; what it still
refuses becomes a CheckpointError that quotes it. (Importing any part of septet registers it with transformers.)
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet import model
from septet.checkpoint.directory import ModelDirectory, open_directory
from septet.checkpoint.gguf_file import check_gguf_file
from septet.checkpoint.source import is_gguf, is_septet, read_config
from septet.errors import CheckpointError, OptionError, SeptetError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from septet.checkpoint import QuantizeOptions

__all__ = [
    "ACTIVATIONS",
    "convert_gguf",
    "is_gguf",
    "is_septet",
    "load_model",
    "load_tokenizer",
    "plan_checkpoint",
    "read_config",
    "resolve_source",
]

ACTIVATIONS = ("int8", "float")
# Copies of the weights in formats that are not read.
HUB_LEAVE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "onnx/*", "original/*")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
# What transformers, and the libraries under it, raise at files that they did not expect.
_REFUSALS = (ArithmeticError, AttributeError, ImportError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def load_model(path: Path, dtype: torch.dtype | str = "auto", activations: str | None = None) -> PreTrainedModel:
    """Load a model for inference.

    Args:
        path: a septet directory, a Hugging Face directory or a .gguf file.
        dtype: dtype of everything that is not quantized; "auto" takes the checkpoint's own (bfloat16 for a .gguf file).
        activations: "int8" or "float" overrides what the checkpoint asks for; None keeps it. Only for septet directories.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        CheckpointError: files are missing, damaged or contradict each other.
        UnsupportedModelError: no model that transformers or septet can run.
        OptionError: `activations` is unknown, or set for a model that septet did not quantize.
    """
    import torch

    if activations is not None and activations not in ACTIVATIONS:
        raise OptionError("activations must be int8 or float", activations, "choose one of the two")
    if activations is not None and not is_septet(path):
        raise OptionError("activations can be chosen for septet directories only", path, "leave the option out")
    if is_gguf(path):
        dtype = torch.bfloat16 if dtype == "auto" else dtype
        return _from_pretrained("AutoModelForCausalLM", path, **_gguf_arguments(path), dtype=dtype).eval()
    read_config(path)
    open_directory(path)
    loaded = _from_pretrained("AutoModelForCausalLM", path, dtype=dtype).eval()
    if activations is not None:
        model.set_activations(loaded, activations)
    return loaded


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Args:
        path: as in `load_model`.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    if is_gguf(path):
        _check_gguf(path)
        return _from_pretrained("AutoTokenizer", path, gguf_file=path.name)
    read_config(path)
    # transformers may build an empty tokenizer when all the files are missing, so look first.
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(
            "a model directory must hold its tokenizer",
            f"{path} without any of {', '.join(TOKENIZER_FILES)}",
            "copy the tokenizer files from the original model",
        )
    return _from_pretrained("AutoTokenizer", path)


def convert_gguf(file: Path, directory: Path) -> None:
    """Write a .gguf file as a Hugging Face directory: bfloat16 weights, tokenizer, chat template.

    Args:
        file: the .gguf file.
        directory: made if need be.

    Raises:
        CheckpointError: the file cannot be read.
    """
    tokenizer, loaded = load_tokenizer(file), load_model(file)
    loaded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def plan_checkpoint(directory: ModelDirectory, options: QuantizeOptions) -> list[model.LayerPlan]:
    """Find the layers of a model on disk that will be quantized; `checkpoint.stream.Hooks` asks for this.

    Args:
        directory: the opened source.
        options: of the run.

    Returns:
        The layers, groups that are quantized together next to each other.

    Raises:
        CheckpointError, UnsupportedModelError: transformers cannot build the model, or it has no layers to quantize.
    """
    import torch
    import transformers

    config = _translated(directory.path, lambda: transformers.AutoConfig.from_pretrained(str(directory.path), local_files_only=True))
    with torch.device("meta"):
        skeleton = _translated(directory.path, lambda: transformers.AutoModelForCausalLM.from_config(config))
    return model.plan(skeleton, options)


def resolve_source(source: str) -> Path:
    """Turn what a user calls a model into a local path: a path that exists, or the id of a model on the Hugging Face hub.

    Args:
        source: a directory, a .gguf file, or an id like "owner/name" (downloaded unless it is in the cache).

    Returns:
        The local path.

    Raises:
        CheckpointError: there is no such path, and the hub has no such model or cannot be reached.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or is_gguf(path):
        return path
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(source, ignore_patterns=HUB_LEAVE))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        got, hint = " ".join(str(error).split())[:300], "check the spelling and the network"
        raise CheckpointError(f"{source} must be a path here or a model on the hub", got, hint) from error


def _from_pretrained(auto_class: str, path: Path, **keywords):
    """Call `auto_class.from_pretrained`."""
    import transformers

    loader = getattr(transformers, auto_class)
    directory = path.parent if is_gguf(path) else path
    return _translated(path, lambda: loader.from_pretrained(str(directory), local_files_only=True, **keywords))


def _translated(path: Path, call: Callable[[], Any]) -> Any:
    """Call transformers and turn what it refuses into an error about the files."""
    import safetensors

    try:
        return call()
    except SeptetError:
        raise
    except (*_REFUSALS, safetensors.SafetensorError) as error:
        for cause in (error.__cause__, error.__context__):
            if isinstance(cause, SeptetError):
                raise cause from error
        got = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        missing = "install what is missing; .gguf files need septet[gguf]"
        hint = missing if isinstance(error, ImportError) else "check that the files belong together"
        raise CheckpointError(f"transformers must be able to load {path}", got, hint) from error


def _gguf_arguments(path: Path) -> dict:
    """Keywords that make transformers dequantize a .gguf file into a plain model."""
    import transformers

    _check_gguf(path)
    keywords = {"gguf_file": path.name}
    # Before 5.2x a .gguf file was always dequantized and the class did not exist.
    if hasattr(transformers, "GgufConfig"):
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return keywords


def _check_gguf(path: Path) -> None:
    """Look at a .gguf file before transformers does; without the library `gguf` transformers refuses it anyway."""
    blocks = None
    with suppress(ImportError):
        from gguf.constants import GGML_QUANT_SIZES

        blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    check_gguf_file(path, blocks)
