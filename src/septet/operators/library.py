"""The torch library that holds septet's operators; they live as long as the object does."""

from __future__ import annotations

import torch

__all__ = ["LIBRARY", "TAGS"]

LIBRARY = torch.library.Library("septet", "DEF")
TAGS = (torch.Tag.pt2_compliant_tag,)
