"""What `save_pretrained` writes of a packed model, and its checksums."""

from __future__ import annotations

import torch
from torch import nn

from septet.checkpoint.integrity import crc32_text
from septet.model import septet_modules

__all__ = ["checksums", "state_dict_of"]


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


def _crc32(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return crc32_text(whole.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
