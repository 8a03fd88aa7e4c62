"""Checking the files of a checkpoint before anything is made of them: headers, shapes, and the CRC of every tensor.

The loader of transformers maps files and casts tensors as it goes, so what arrives in the model need not have the bytes of the file.
Checking the files themselves has no exceptions, finds missing tensors too, and warms the page cache for the loader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from septet.checkpoint.description import check_layer, checksums_of, layers_of
from septet.checkpoint.directory import ModelDirectory
from septet.checkpoint.integrity import crc32_of_tensor
from septet.checkpoint.tensor_file import open_tensor_file
from septet.errors import CheckpointError
from septet.quantize.threads import default_threads

__all__ = ["check_files"]


def check_files(paths: Sequence[str], quantization: Mapping[str, object]) -> None:
    """Check the shards of a checkpoint.

    Args:
        paths: the files that will be loaded.
        quantization: `quantization_config` of the checkpoint.

    Raises:
        CheckpointError: a file is no safetensors file or damaged; a layer's tensors are not what `layers` says; a tensor is missing, not
            listed, in two files, or has not the CRC that is listed.
    """
    wrong = [path for path in paths if not str(path).endswith(".safetensors")]
    if wrong:
        hint = "pickle can run code, so septet does not read it; fetch the safetensors files"
        raise CheckpointError("weights must be safetensors files", Path(wrong[0]).name, hint)
    files = {str(path): open_tensor_file(Path(path)) for path in paths}
    owners: dict[str, str] = {}
    for name, file in files.items():
        for key in file.entries.keys() & owners.keys():
            # Only one of the two would be checked, and the loader may take the other.
            got = f"{key}, one in {Path(owners[key]).name} too"
            raise CheckpointError(f"{Path(name).name} must hold tensors that no other file holds", got, "fetch the checkpoint again")
        owners |= dict.fromkeys(file.entries, name)
    expected = checksums_of(quantization)
    for key in sorted(expected.keys() - owners.keys()):
        raise CheckpointError(f"the checkpoint must hold {key}, as config.json says", "no such tensor", "fetch the checkpoint again")
    for key in sorted(owners.keys() - expected.keys()):
        raise CheckpointError(f"config.json must list a crc32 of {key}", "none", "fetch config.json and the weights again, together")
    directory = ModelDirectory(Path(paths[0]).parent, {}, files, owners)
    for name, entry in layers_of(quantization).items():
        # Where transformers renames modules, the keys on disk have the old names; such layers are checked once they are loaded.
        if f"{name}.weight" in owners:
            check_layer(directory, name, entry)
    with ThreadPoolExecutor(min(default_threads(), 8)) as pool:
        found = dict(zip(owners, pool.map(lambda key: crc32_of_tensor(files[owners[key]], key), owners)))
    for key, checksum in found.items():
        if checksum != expected[key]:
            hint = f"{Path(owners[key]).name} is damaged; fetch it again"
            raise CheckpointError(f"{key} must have the CRC {expected[key]} of config.json", checksum, hint)
