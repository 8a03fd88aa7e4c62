"""A cache of keys and values with room for all tokens to come, so that it is not copied for each of them.

transformers' own growing cache is copied for every token, and its fixed-size cache attends to the places that are still empty. This one
takes its memory once and shows the part that is filled: the same values, so the same text.
"""

from __future__ import annotations

import math

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

__all__ = ["preallocate"]


def preallocate(cache: Cache, tokens: int) -> Cache:
    """Give a growing cache room.

    Args:
        cache: behind the first tokens of a text, changed in place: keys and values [rows, heads, tokens so far, features], any dtype.
            Layers that keep a window of the text stay as they are, and so do other caches.
        tokens: of the whole text.

    Returns:
        The same cache.
    """
    if not isinstance(cache, DynamicCache):
        return cache
    growing = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.is_initialized]
    sizes = [(*held.shape[:-2], tokens, held.shape[-1]) for layer in growing for held in (layer.keys, layer.values)]
    # One piece of memory, so that all of it goes back to the system in the end.
    store = growing[0].keys.new_empty(sum(map(math.prod, sizes))) if growing else None
    parts = iter(store.split([math.prod(size) for size in sizes]) if growing else ())
    shaped = iter(part.view(size) for part, size in zip(parts, sizes))
    cache.layers = [_PreallocatedLayer(layer, next(shaped), next(shaped)) if layer in growing else layer for layer in cache.layers]
    return cache


class _PreallocatedLayer(DynamicLayer):
    """Keys and values that grow within memory taken once.

    Args:
        layer: to go on from, with keys and values, [rows, heads, tokens, features] each.
        keys: memory for as many tokens as there will be.
        values: the same for values.
    """

    def __init__(self, layer: DynamicLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.__dict__.update(layer.__dict__)
        self._stores = keys, values
        for store, held in zip(self._stores, (layer.keys, layer.values)):
            store[..., : held.shape[-2], :] = held

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *rest: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens; returns all keys and values so far."""
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        for store, states in zip(self._stores, (key_states, value_states)):
            store[..., start:stop, :] = states
        self.keys, self.values = (store[..., :stop, :] for store in self._stores)
        return self.keys, self.values
