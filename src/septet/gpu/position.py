"""Where the next token of a text stands: a number on the device, which kernels read and move on, and the same number on the host.

A kernel that finds no room in its cache can only stop, which ends all CUDA work of the process. The host counts along, so it can refuse
before, and never has to ask the device.
"""

from __future__ import annotations

import torch

from septet.errors import OptionError

__all__ = ["Position"]


class Position:
    """A place in a cache.

    Args:
        length: places of the cache.
        device: that has it.

    Attributes:
        on_device: int32 [1], for kernels, which add 1 for each token.
        on_host: the same, once the device has done all it was told to.
    """

    def __init__(self, length: int, device: torch.device | str) -> None:
        self._length = length
        self.on_device = torch.zeros(1, dtype=torch.int32, device=device)
        self.on_host = 0

    @torch.inference_mode()
    def move_to(self, place: int) -> None:
        """The next token stands here; 0 begins a text.

        Args:
            place: 0..length; at `length` the cache is full.

        Raises:
            OptionError: another place.
        """
        if not 0 <= place <= self._length:
            raise OptionError(f"a place must be one of the cache's {self._length}", place, "make a longer cache")
        self.on_device.fill_(place)
        self.on_host = place

    def advance(self) -> None:
        """Count a token that the device is about to take.

        Raises:
            OptionError: the cache is full; nothing has changed.
        """
        if self.on_host == self._length:
            hint = "begin another text, or make a longer cache"
            raise OptionError(f"a text must fit into the cache's {self._length} places", f"token {self.on_host + 1}", hint)
        self.on_host += 1
