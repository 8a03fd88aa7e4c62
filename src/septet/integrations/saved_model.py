"""What `save_pretrained` writes of a packed model, its checksums, and septet.json beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from septet import __version__
from septet.checkpoint.directory import CONFIG_NAME, json_bytes, shard_names
from septet.checkpoint.integrity import HASHES_NAME, crc32_text, hashes_of
from septet.checkpoint.layout import INDEX_NAME
from septet.checkpoint.options import FORMAT_VERSION
from septet.checkpoint.workspace import writing
from septet.model import septet_modules

__all__ = ["checksums", "state_dict_of", "write_hashes"]


def state_dict_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model as they are stored: input scales are float16 on disk, whatever the dtype of the model."""
    state_dict = model.state_dict()
    stored: dict[int, torch.Tensor] = {}
    for name, module in septet_modules(model):
        signs = module.weight_input_scale
        if signs is not None and signs.dtype != torch.float16:
            # One tensor for all modules that are tied, or transformers would take them for different ones.
            state_dict[f"{name}.weight_input_scale"] = stored.setdefault(id(signs), signs.detach().to(torch.float16))
    return state_dict


def checksums(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, str]:
    """CRC-32 of every tensor under its key on disk.

    Args:
        model: whose tensors they are.
        state_dict: from `state_dict_of`; what `save_pretrained` will do to it is done to a copy here.

    Returns:
        Tensor key -> eight hexadecimal digits.
    """
    # Registering happens while transformers.modeling_utils is being imported; it cannot be imported before that ends.
    from transformers import core_model_loading, modeling_utils

    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    kept = {key: tensor for key, tensor in state_dict.items() if key not in ignored}
    kept = modeling_utils.remove_tied_weights_from_state_dict(kept, model)
    kept = core_model_loading.revert_weight_conversion(model, kept)
    return {key: _crc32(tensor) for key, tensor in kept.items()}


def write_hashes(path: Path) -> None:
    """Write septet.json beside what `save_pretrained` has just written. A tokenizer is not part of that, so it is not in it.

    Raises:
        CheckpointError: the files do not belong together (an index of another model in the same place), or cannot be written.
    """
    shards = shard_names(path)
    others = [name for name in (CONFIG_NAME, "generation_config.json", INDEX_NAME) if (path / name).is_file()]
    hashes = {"format_version": FORMAT_VERSION, "septet_version": __version__, **hashes_of(path, shards, others)}
    with writing(path / HASHES_NAME):
        (path / HASHES_NAME).write_bytes(json_bytes(hashes))


def _crc32(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return crc32_text(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
