"""Calibration text that the model writes itself: no data is needed, and it is in the languages the model knows.

Sequences are drawn at temperature 1 from the model's own predictions, many side by side, since one token at a time is bound by memory.
Each batch has a generator of its own, so neither threads nor other batches change what is drawn.

Reference: data-free calibration after Liu et al. 2023 (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from septet.calibration.workers import map_windows

__all__ = ["sample_windows"]

#: Sequences that are written together: half of all, so that two threads have something to do, but no more than this.
_MOST_TOGETHER = 16


def sample_windows(
    model: nn.Module,
    windows: int,
    context: int,
    start_token: int,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Let a model write.

    Args:
        model: a causal language model of transformers, in eval mode.
        windows: how many sequences.
        context: tokens of each, the start included.
        start_token: every sequence starts with it: BOS, or what ends a text.
        seed: of the draws.
        threads: 0 is the default number; the result does not depend on it.
        progress: called with the number of windows done.

    Returns:
        int64 [windows, context].
    """
    together = min(_MOST_TOGETHER, -(-windows // 2))
    batches = [(start, min(together, windows - start)) for start in range(0, windows, together)]

    def write(batch: tuple[int, int]) -> torch.Tensor:
        start, rows = batch
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        return _write(model, torch.full((rows, 1), start_token), context, generator)

    written: list[torch.Tensor] = []
    for results in map_windows(write, batches, threads):
        written += results
        progress(sum(map(len, written)))
    return torch.cat(written).clone()


def _write(model: nn.Module, tokens: torch.Tensor, context: int, generator: torch.Generator) -> torch.Tensor:
    """Draw until int64 [rows, 1] has grown to [rows, context]."""
    cache, latest = None, tokens
    while tokens.shape[1] < context:
        output = model(input_ids=latest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        latest = torch.multinomial(torch.softmax(output.logits[:, -1].float(), -1), 1, generator=generator)
        tokens = torch.cat([tokens, latest], 1)
    return tokens
