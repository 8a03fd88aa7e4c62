"""The torch library that holds septet's operators, which live as long as the object does, and the GPU that they run on."""

from __future__ import annotations

import torch

from septet.errors import OptionError

__all__ = ["LIBRARY", "TAGS", "common_gpu"]

LIBRARY = torch.library.Library("septet", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)


def common_gpu(*tensors: torch.Tensor | None) -> torch.cuda.device:
    """The GPU that all tensors are on, as the current one within a `with`: torch sets it for its own operators only.

    Raises:
        OptionError: they are on several devices.
    """
    first = tensors[0].device
    for tensor in tensors:
        if tensor is not None and tensor.device != first:
            raise OptionError("inputs must be on the device of the weights", f"{first} and {tensor.device}", "move the inputs")
    return torch.cuda.device(first.index)
