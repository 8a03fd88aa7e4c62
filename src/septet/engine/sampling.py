"""How the next token is drawn: options, and a drawer with a private generator, so that one seed gives one text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from septet.errors import CheckpointError, OptionError

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token; above 0 divides the logits.
        top_k: draw among the k likeliest; 0 means all.
        top_p: draw among the likeliest that hold this share of the probability, 0 < top_p <= 1.
        seed: of the private generator, not negative.
        min_p: leave out tokens less likely than this share of the likeliest one, 0 <= min_p <= 1.
        repetition_penalty: 0.001 to 1000; above 1 makes tokens that stand in the text less likely (Keskar et al., CTRL, 2019,
            arXiv:1909.05858).
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1", self.max_new_tokens),
            (self.temperature >= 0, "temperature must not be negative", self.temperature),
            (self.top_k >= 0, "top_k must not be negative", self.top_k),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p),
            (self.seed >= 0, "seed must not be negative", self.seed),
            (0 <= self.min_p <= 1, "min_p must be between 0 and 1", self.min_p),
            (0.001 <= self.repetition_penalty <= 1000, "repetition_penalty must be between 0.001 and 1000", self.repetition_penalty),
        )
        for holds, requirement, got in checks:
            if not holds:
                raise OptionError(requirement, got, "correct the option")


class Sampler:
    """Draws the tokens of one text.

    Args:
        sampling: the options.
        text: tokens of the prompt, for the repetition penalty.
    """

    def __init__(self, sampling: Sampling, text: Sequence[int] = ()) -> None:
        self._sampling = sampling
        self._generator = np.random.default_rng(sampling.seed)
        self._seen = set(text)

    def draw(self, logits: np.ndarray) -> int:
        """Draw a token and remember it.

        Args:
            logits: float32 [vocabulary].

        Raises:
            CheckpointError: the logits are not finite.
        """
        sampling = self._sampling
        if not np.isfinite(logits.max()):
            hint = "the weights, or an input, hold infinities or NaN: run `septet verify`"
            raise CheckpointError("a model's logits must be finite", logits.max(), hint)
        if sampling.repetition_penalty != 1 and self._seen:
            logits = logits.copy()
            seen = np.fromiter(self._seen, np.int64)
            chosen, penalty = logits[seen], np.float32(sampling.repetition_penalty)
            logits[seen] = np.where(chosen > 0, chosen / penalty, chosen * penalty)
        token = int(logits.argmax()) if sampling.temperature == 0 else self._draw_warm(logits)
        self._seen.add(token)
        return token

    def _draw_warm(self, logits: np.ndarray) -> int:
        tokens, weights = _candidates(logits, self._sampling)
        sums = np.cumsum(weights)
        place = np.searchsorted(sums, self._generator.random() * sums[-1], side="right")
        return int(tokens[min(place, len(tokens) - 1)])


def _candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, and their weights in float64."""
    with np.errstate(over="ignore"):  # a tiny temperature leaves the likeliest tokens alone
        weights = np.exp((logits.astype(np.float64) - logits.max()) / sampling.temperature)
    tokens = np.arange(len(weights))
    if 0 < sampling.top_k < len(weights):
        least = np.partition(weights, -sampling.top_k)[-sampling.top_k]
        tokens, weights = _ranked(tokens, weights, weights >= least)
        tokens, weights = tokens[: sampling.top_k], weights[: sampling.top_k]
    if sampling.top_p < 1:
        total = weights.sum()
        # What this leaves out holds less than 1 - top_p together, so the tokens to keep are all in, and far fewer have to be sorted.
        tokens, weights = _ranked(tokens, weights, weights >= (1 - sampling.top_p) * total / len(weights))
        kept = np.cumsum(weights) - weights < sampling.top_p * total
        tokens, weights = tokens[kept], weights[kept]
    if sampling.min_p:
        kept = weights >= sampling.min_p * weights.max()
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights


def _ranked(tokens: np.ndarray, weights: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is kept, largest weight first, equal ones in their old order."""
    tokens, weights = tokens[kept], weights[kept]
    order = np.argsort(-weights, kind="stable")
    return tokens[order], weights[order]
