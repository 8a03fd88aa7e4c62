"""The cache that takes its memory once shows what the growing one holds."""

from __future__ import annotations

from pathlib import Path

import torch

from septet.calibration.preallocated_cache import preallocate
from septet.loading import load_model

TOKENS = 12


def cached(model: torch.nn.Module, room: bool) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Predictions and what is cached behind a text given in parts of one token and of several."""
    tokens = torch.randint(0, 256, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        cache = model(input_ids=tokens[:, :1], use_cache=True).past_key_values
        cache = preallocate(cache, TOKENS) if room else cache
        parts = [model(input_ids=part, past_key_values=cache, use_cache=True).logits for part in tokens[:, 1:].split([1, 4, 6], 1)]
    assert cache.get_seq_length() == TOKENS
    return torch.cat(parts, 1), [(layer.keys, layer.values) for layer in cache.layers]


def test_the_same_keys_values_and_predictions(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype="float32")
    (grown, kept), (roomy, stored) = (cached(model, room) for room in (False, True))
    assert torch.equal(grown, roomy)
    for before, after in zip(kept, stored, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(before, after))


def test_memory_is_taken_once(tiny_model_dir: Path) -> None:
    model = load_model(tiny_model_dir, dtype="float32")
    with torch.no_grad():
        cache = preallocate(model(input_ids=torch.tensor([[1]]), use_cache=True).past_key_values, TOKENS)
        places = []
        for token in range(2, TOKENS):
            model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            places.append([layer.keys.data_ptr() for layer in cache.layers])
    assert all(place == places[0] for place in places)


def test_other_caches_stay_as_they_are() -> None:
    from transformers import LlamaConfig, StaticCache

    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=16)
    cache = StaticCache(config=config, max_cache_len=TOKENS)
    layers = list(cache.layers)
    assert preallocate(cache, TOKENS) is cache and cache.layers == layers
