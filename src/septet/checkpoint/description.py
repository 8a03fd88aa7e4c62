"""The quantization_config of a checkpoint, checked: version, layers, and that the stored tensors are what the layers promise."""

from __future__ import annotations

from septet.checkpoint.directory import ModelDirectory
from septet.checkpoint.options import FORMAT_VERSION
from septet.checkpoint.tensor_file import NUMPY_DTYPES, TensorEntry
from septet.errors import CheckpointError, SpecVersionError, UnsupportedModelError
from septet.quantize.stored import stored_arrays

__all__ = ["check_layer", "checksums_of", "layers_of", "quantization_of"]


def quantization_of(config: dict, name: str) -> dict:
    """The quantization_config of a model's config.

    Args:
        config: content of config.json.
        name: of the checkpoint, for messages.

    Raises:
        SpecVersionError: it follows another version of the format.
        UnsupportedModelError: septet has not quantized it.
    """
    entry = config.get("quantization_config")
    method = entry.get("quant_method") if isinstance(entry, dict) else None
    if method != "septet":
        raise UnsupportedModelError(f"{name} must be quantized by septet", f"quant_method {method}", "quantize it with `septet quantize`")
    if entry.get("format_version") != FORMAT_VERSION:
        hint = "update septet, or quantize the model again"
        raise SpecVersionError(f"format_version of {name} must be {FORMAT_VERSION}", entry.get("format_version"), hint)
    return entry


def layers_of(quantization: dict) -> dict[str, dict]:
    """Module name -> entry.

    Raises:
        CheckpointError: there is no such table.
    """
    layers = quantization.get("layers")
    if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
        raise CheckpointError("quantization_config must list its layers", type(layers).__name__, "fetch config.json again")
    return layers


def checksums_of(quantization: dict) -> dict[str, str]:
    """Tensor key -> CRC-32.

    Raises:
        CheckpointError: there is no such table.
    """
    checksums = quantization.get("crc32")
    if not isinstance(checksums, dict) or not all(isinstance(value, str) for value in checksums.values()):
        raise CheckpointError("quantization_config must list a crc32 of every tensor", type(checksums).__name__, "fetch config.json again")
    return checksums


def check_layer(directory: ModelDirectory, name: str, entry: dict) -> dict[str, TensorEntry]:
    """Compare a layer's stored tensors with its description.

    Returns:
        Tensor key -> entry, the weight first.

    Raises:
        CheckpointError: one is missing, or has another dtype or shape.
    """
    found = {}
    for part, (dtype, shape) in stored_arrays(entry, name).items():
        key = f"{name}.{part}"
        if key not in directory.owners:
            raise CheckpointError(f"the checkpoint must hold {key}", "no such tensor", "fetch the checkpoint again")
        stored = directory.entry(key)
        if NUMPY_DTYPES.get(stored.dtype) != dtype or stored.shape != shape:
            got = f"{stored.dtype} {list(stored.shape)}"
            raise CheckpointError(f"{key} must be {dtype} {list(shape)}, as config.json says", got, "fetch the checkpoint again")
        found[key] = stored
    return found
