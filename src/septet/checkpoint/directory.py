"""A model directory: config.json, safetensors shards, and the small files that travel along.

Nothing in it is executed or trusted: JSON is parsed, headers are checked by `tensor_file`, names in an index must be plain file
names. Pickle files (.bin, .pt) are refused.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from septet.checkpoint.layout import INDEX_NAME
from septet.checkpoint.tensor_file import TensorEntry, TensorFile, open_tensor_file
from septet.errors import CheckpointError

__all__ = ["CONFIG_NAME", "ModelDirectory", "companion_files", "json_bytes", "open_directory", "read_json", "shard_names"]

CONFIG_NAME = "config.json"
_COMPANION_SUFFIXES = {".json", ".jinja", ".md", ".model", ".py", ".tiktoken", ".txt"}
_COMPANION_STEMS = ("license", "licence", "notice", "copying", "use_policy")
_COMPANION_FOLDERS = ("additional_chat_templates",)
_NOT_COMPANIONS = {CONFIG_NAME, INDEX_NAME, "septet.json", "pytorch_model.bin.index.json"}
#: As for the header of a safetensors file.
_MAX_JSON_BYTES = 100_000_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class ModelDirectory:
    """A directory whose config and headers have been read.

    Args:
        path: the directory.
        config: the object in config.json.
        files: shard name -> checked file.
        owners: tensor key -> name of its shard.
    """

    path: Path
    config: dict
    files: dict[str, TensorFile]
    owners: dict[str, str]

    def file_of(self, key: str) -> TensorFile:
        """The shard that holds a tensor."""
        return self.files[self.owners[key]]

    def entry(self, key: str) -> TensorEntry:
        """Dtype, shape and place of a tensor."""
        return self.file_of(key).entries[key]


def read_json(path: Path) -> dict:
    """Read a file that must hold one JSON object.

    Raises:
        CheckpointError: it is missing, unreadable or something else.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_JSON_BYTES + 1)
        if len(content) > _MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} must have at most {_MAX_JSON_BYTES} bytes", "more", f"{path} is damaged; fetch it again")
        value = json.loads(content.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path.name} must be readable", error.strerror or error, f"check that {path.parent} is a whole model"
        ) from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} must be JSON", error, f"{path} is damaged; fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object", type(value).__name__, f"{path} is damaged; fetch it again")
    return value


def json_bytes(value: object) -> bytes:
    """A JSON file as every septet writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def open_directory(path: Path) -> ModelDirectory:
    """Read config.json and the header of every shard.

    Raises:
        CheckpointError: a file is missing, damaged, or contradicts another one.
    """
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        raise CheckpointError(f"{path} must be a model directory", got, "give a Hugging Face directory, a .gguf file or a hub id")
    config = read_json(path / CONFIG_NAME)
    files = {name: open_tensor_file(path / name) for name in shard_names(path)}
    owners = {key: name for name, file in files.items() for key in file.entries}
    if (path / INDEX_NAME).is_file():
        owners = _weight_map(path)
        for key, name in owners.items():
            if key not in files[name].entries:
                raise CheckpointError(f"{name} must hold {key}, as {INDEX_NAME} says", "no such tensor", "fetch both files again")
    return ModelDirectory(path, config, files, owners)


def shard_names(path: Path) -> list[str]:
    """The names of the shards of a model directory, sorted.

    Raises:
        CheckpointError: there is none, only pickle files, or a choice that no index decides.
    """
    if (path / INDEX_NAME).is_file():
        return sorted(set(_weight_map(path).values()))
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if "model.safetensors" in found or len(found) == 1:
        return ["model.safetensors"] if "model.safetensors" in found else found
    if found:
        raise CheckpointError(f"several shards must come with {INDEX_NAME}", f"{len(found)} shards without it", "fetch the index too")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        hint = "pickle can run code, so septet does not read it: load the model with transformers and save_pretrained it"
        raise CheckpointError("weights must be safetensors files", f"{pickles[0]} in {path}", hint)
    raise CheckpointError(f"{path} must hold model.safetensors or shards with {INDEX_NAME}", "no weights", "fetch the whole model")


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor key -> shard name of an index, after checking that every name is a plain file name."""
    weight_map = read_json(path / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} must have a weight_map", type(weight_map).__name__, "fetch the index again")
    for key, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors") or set("\\\0") & set(name):
            raise CheckpointError("a shard's name must be a plain .safetensors file name", f"{name!r} for {key}", "fetch the index again")
    return weight_map


def companion_files(path: Path) -> list[str]:
    """Names, relative to the directory and sorted, of the files that travel along: tokenizer, templates, licence, code."""
    found = [file for file in path.iterdir() if _is_companion(file)]
    for folder in _COMPANION_FOLDERS:
        found += [file for file in (path / folder).glob("*.jinja") if file.is_file()]
    return sorted(file.relative_to(path).as_posix() for file in found)


def _is_companion(file: Path) -> bool:
    if not file.is_file() or file.name.startswith(".") or file.name in _NOT_COMPANIONS:
        return False
    if file.name.endswith(".safetensors.index.json"):
        return False
    return file.suffix.lower() in _COMPANION_SUFFIXES or file.name.lower().startswith(_COMPANION_STEMS)
