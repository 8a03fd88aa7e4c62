"""Text to windows of tokens, by the rule of llama.cpp's perplexity tool.

The text is tokenized once, with the special tokens the tokenizer adds by itself, and cut into non-overlapping windows of
`context` tokens; what does not fill a window is dropped. When the tokenizer starts a text with BOS, the first token of
every window is replaced by BOS. Score "half" takes the predictions made at positions context//2 .. context-2 (255 of a
window of 512), so that each has at least half a window before it; "all" takes every position that has a next token.

Reference: llama.cpp (MIT licence), tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from septet.errors import OptionError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SCORES", "Windows", "cut_windows"]

SCORES = ("half", "all")
MINIMUM_WINDOWS = 2


@dataclass(frozen=True)
class Windows:
    """Windows of one text.

    Attributes:
        tokens: int64 [windows, context].
        first: first position whose prediction is scored, 0 <= first <= context - 2.
        starts_with_bos: whether the first token of each window was replaced by BOS.
    """

    tokens: torch.Tensor
    first: int
    starts_with_bos: bool

    @property
    def context(self) -> int:
        """Tokens of one window."""
        return self.tokens.shape[1]

    @property
    def scored(self) -> int:
        """Scored predictions of one window."""
        return self.context - 1 - self.first


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, context: int, score: str) -> Windows:
    """Tokenize a text and cut it.

    Args:
        tokenizer: a transformers tokenizer.
        text: any length; must fill at least two windows, or there is no standard error.
        context: tokens of a window, at least 4.
        score: "half" or "all".

    Returns:
        The windows, whole ones only.

    Raises:
        OptionError: the score is unknown, the context too short or the text too short.
    """
    if score not in SCORES:
        raise OptionError("score must be half or all", score, "choose one of the two")
    if context < 4:
        raise OptionError("context must be at least 4 tokens", context, "use 512, as llama.cpp does")
    plain = _encode(tokenizer, text, special=False)
    bos = _leading_bos(tokenizer)
    ids = plain if bos is None else [bos, *plain]
    count = len(ids) // context
    if count < MINIMUM_WINDOWS:
        raise OptionError(
            f"the text must fill at least {MINIMUM_WINDOWS} windows of {context} tokens",
            f"{len(ids)} tokens",
            "give a longer text or a smaller context",
        )
    tokens = torch.tensor(ids[: count * context], dtype=torch.int64).reshape(count, context)
    if bos is not None:
        tokens[:, 0] = bos
    return Windows(tokens, context // 2 if score == "half" else 0, bos is not None)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS token if this tokenizer puts it before a text, else None."""
    bos = tokenizer.bos_token_id
    starts = bos is not None and _encode(tokenizer, "a", special=True)[:1] == [bos]
    return bos if starts and _encode(tokenizer, "a", special=False)[:1] != [bos] else None
