"""Perplexity and its standard error.

The negative log-likelihood of a window is the mean over its scored tokens. All windows score the same number of tokens, so
the mean over windows is the mean over tokens. Tokens of one window depend on each other, windows hardly: the standard error
is taken over windows, and carried through exp() by the delta method, se(exp(m)) = exp(m) se(m).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

__all__ = ["mean_with_error", "perplexity", "token_nll"]


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target.

    Args:
        logits: float32 [positions, vocabulary].
        targets: int64 [positions], 0 <= target < vocabulary.

    Returns:
        float32 [positions], in nats.
    """
    return torch.logsumexp(logits, -1) - logits.gather(-1, targets[:, None])[:, 0]


def mean_with_error(window_means: Sequence[float]) -> tuple[float, float]:
    """Mean of the windows' means and its standard error.

    Args:
        window_means: one figure per window, at least two.

    Returns:
        (mean, standard error), the latter with n - 1 degrees of freedom.
    """
    count = len(window_means)
    mean = math.fsum(window_means) / count
    variance = math.fsum((value - mean) ** 2 for value in window_means) / (count - 1)
    return mean, math.sqrt(variance / count)


def perplexity(window_nll: Sequence[float]) -> tuple[float, float]:
    """Perplexity and its standard error over windows.

    Args:
        window_nll: mean negative log-likelihood of each window, nats, at least two windows.

    Returns:
        (perplexity, standard error); infinite when the mean is too large for exp().
    """
    mean, error = mean_with_error(window_nll)
    try:
        value = math.exp(mean)
    except OverflowError:
        return math.inf, math.inf
    return value, value * error
