"""Calibration text that the model writes itself: no data is needed, and it is in the languages the model knows.

Sequences are drawn at temperature 1 from the model's own predictions, many side by side, since one token at a time is bound by memory.
Each batch has a generator of its own, so neither threads nor other batches change what is drawn. On a GPU a model that fits lies there
meanwhile; of a larger one each block is fetched for every token, which many sequences share.

Reference: data-free calibration after Liu et al. 2023 (LLM-QAT, arXiv 2305.17888).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from septet.calibration.fetching import Fetching
from septet.calibration.workers import Machine, at_work, map_windows

__all__ = ["sample_windows"]

#: Sequences that are written together: half of all, so that two threads have something to do, but no more than this.
_MOST_TOGETHER = 16
#: The same on a GPU, where all blocks may have to be fetched for every token.
_MOST_TOGETHER_ON_GPU = 64
#: Not cuDNN's: it compiles for every length that the text has on its way.
_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
#: A model is taken to a GPU as a whole when this part of what is free there is enough for its weights.
_SHARE_FOR_WEIGHTS = 0.75
#: And no more than this is used for weights, so that any card of 24 GB writes the same way.
_MOST_BYTES_FOR_WEIGHTS = 17 << 30


def sample_windows(
    model: nn.Module,
    windows: int,
    context: int,
    start_token: int,
    seed: int = 0,
    machine: Machine | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Let a model write.

    Args:
        model: a causal language model of transformers, in eval mode.
        windows: how many sequences.
        context: tokens of each, the start included.
        start_token: every sequence starts with it: BOS, or what ends a text.
        seed: of the draws.
        machine: where; None: the processor. The result does not depend on the number of threads.
        progress: called with the number of windows done.

    Returns:
        int64 [windows, context].
    """
    machine = machine or Machine()
    together = min(windows, _MOST_TOGETHER_ON_GPU) if machine.is_gpu else min(_MOST_TOGETHER, -(-windows // 2))
    batches = [(start, min(together, windows - start)) for start in range(0, windows, together)]

    def write(batch: tuple[int, int]) -> torch.Tensor:
        start, rows = batch
        generator = torch.Generator(machine.device).manual_seed(seed * 1_000_003 + start)
        return _write(model, torch.full((rows, 1), start_token, device=machine.device), context, generator).to("cpu")

    written: list[torch.Tensor] = []
    with _within_reach(model, machine), sdpa_kernel(_ATTENTION) if machine.is_gpu else ExitStack():
        for results in map_windows(write, batches, machine):
            written += results
            progress(sum(map(len, written)))
    return torch.cat(written).clone()


def _write(model: nn.Module, tokens: torch.Tensor, context: int, generator: torch.Generator) -> torch.Tensor:
    """Draw until int64 [rows, 1] has grown to [rows, context]."""
    from septet.calibration.preallocated_cache import preallocate  # transformers is needed only here

    cache, latest = None, tokens
    while tokens.shape[1] < context:
        output = model(input_ids=latest, past_key_values=cache, use_cache=True)
        cache = output.past_key_values if cache is not None else preallocate(output.past_key_values, context)
        latest = torch.multinomial(torch.softmax(output.logits[:, -1].float(), -1), 1, generator=generator)
        tokens = torch.cat([tokens, latest], 1)
    return tokens


@contextmanager
def _within_reach(model: nn.Module, machine: Machine) -> Iterator[None]:
    """A model that can be called on the machine, until the end of the `with`."""
    if not machine.is_gpu:
        yield
        return
    free = torch.cuda.mem_get_info(machine.device)[0] if machine.device.startswith("cuda") else _MOST_BYTES_FOR_WEIGHTS
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if needed <= min(_SHARE_FOR_WEIGHTS * free, _MOST_BYTES_FOR_WEIGHTS):
        with at_work([model], machine, None):
            yield
        return
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    blocks = max(lists, key=lambda blocks: sum(parameter.nbytes for parameter in blocks.parameters()), default=nn.ModuleList())
    inside = {id(parameter) for parameter in blocks.parameters()}
    outside = [module for module in model.modules() if not any(id(parameter) in inside for parameter in module.parameters())]
    with at_work(outside, machine, None), ExitStack() as fetched:
        if len(blocks):
            fetched.callback(Fetching(list(blocks), machine.device).remove)
        yield
