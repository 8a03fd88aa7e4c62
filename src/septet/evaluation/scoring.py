"""Run a model over windows, beside a reference, and keep a few figures of each window.

Only the scored positions go through the head, and logits live no longer than their window. So the memory is both models plus
the windows at work: 2 x scored x vocabulary x 4 bytes each (2 x 50 MB for half of 512 tokens and a vocabulary of 49,152),
however long the text is. Up to four windows are at work, each on its share of the processors: small products leave many
threads waiting for each other. float32 throughout: products in bfloat16 would take half the time, but change 1 % of the
first tokens and put a floor of 0.0001 nats under the divergence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from septet.errors import CheckpointError, OptionError
from septet.evaluation.divergence import divergence
from septet.evaluation.perplexity import mean_with_error, perplexity, token_nll
from septet.evaluation.windows import Windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["score_models"]

WINDOWS_AT_WORK = 4
WITHOUT_REFERENCE = dict.fromkeys(("reference_perplexity", "kld_mean", "kld_stderr", "kld_p99", "top1_agreement"))


@dataclass(frozen=True)
class _Scores:
    """Figures of one window: mean NLL of the model; with a reference also its mean NLL, KL per position, and equal first tokens."""

    nll: float
    reference_nll: float | None = None
    kl: np.ndarray | None = None
    same_first: int = 0


def score_models(
    model: PreTrainedModel,
    windows: Windows,
    reference: PreTrainedModel | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float | None]:
    """Run loaded models over windows.

    Args:
        model: the model to judge, float32.
        windows: what `cut_windows` gave.
        reference: the model to compare with, float32.
        progress: called with (windows done, windows) after each window.

    Returns:
        perplexity, perplexity_stderr, reference_perplexity, kld_mean, kld_stderr, kld_p99, top1_agreement; all but the first
        two are None without a reference.

    Raises:
        OptionError: the windows are longer than the model's positions.
        CheckpointError: the vocabularies differ.
    """
    for judged in filter(None, (model, reference)):
        limit = getattr(judged.config, "max_position_embeddings", None)
        if limit is not None and windows.context > limit:
            raise OptionError(f"context must be at most {limit} tokens for this model", windows.context, "choose a smaller context")
    total = len(windows.tokens)
    threads = torch.get_num_threads()
    at_work = min(threads, total, WINDOWS_AT_WORK)
    # New threads take over this number; it is process-wide, so it is put back.
    torch.set_num_threads(max(1, threads // at_work))
    pool = ThreadPoolExecutor(at_work)
    scores = []
    try:
        for score in pool.map(lambda index: _score_window(model, reference, windows, index), range(total)):
            scores.append(score)
            if progress is not None:
                progress(len(scores), total)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
    return _figures(scores)


@torch.inference_mode()
def _score_window(model: PreTrainedModel, reference: PreTrainedModel | None, windows: Windows, index: int) -> _Scores:
    targets = windows.tokens[index, windows.first + 1 :]
    logits = _scored_logits(model, windows, index)
    nll = token_nll(logits, targets).double().mean().item()
    if reference is None:
        return _Scores(nll)
    expected = _scored_logits(reference, windows, index)
    if expected.shape != logits.shape:
        sizes = f"{logits.shape[-1]} and {expected.shape[-1]} tokens"
        raise CheckpointError("model and reference must share one vocabulary", sizes, "name the model this one was quantized from")
    kl, same = divergence(expected, logits)
    return _Scores(nll, token_nll(expected, targets).double().mean().item(), kl.double().numpy(), int(same.sum()))


def _scored_logits(model: PreTrainedModel, windows: Windows, index: int) -> torch.Tensor:
    """Logits of the scored positions of one window, float32 [scored, vocabulary]."""
    keep = windows.scored + 1
    # Most architectures can leave the other positions out of the head.
    keywords = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    logits = model(input_ids=windows.tokens[index : index + 1], use_cache=False, **keywords).logits
    return logits[0, -keep:-1].float()


def _figures(scores: list[_Scores]) -> dict[str, float | None]:
    value, error = perplexity([score.nll for score in scores])
    figures = {"perplexity": value, "perplexity_stderr": error}
    if scores[0].kl is None:
        return figures | WITHOUT_REFERENCE
    mean, error = mean_with_error([float(score.kl.mean()) for score in scores])
    positions = np.concatenate([score.kl for score in scores])
    return figures | {
        "reference_perplexity": perplexity([score.reference_nll for score in scores])[0],
        "kld_mean": mean,
        "kld_stderr": error,
        "kld_p99": float(np.quantile(positions, 0.99)),
        "top1_agreement": sum(score.same_first for score in scores) / positions.size,
    }
