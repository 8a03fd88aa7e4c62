"""Text from a model, one token at a time, through transformers' forward pass and its key-value cache.

The loop is our own because it is short: it streams, it draws from a private generator (the same seed gives the same text,
and nobody else's random state moves), and it times the prompt and the tokens apart. Temperature 0 takes the likeliest token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from septet.errors import CheckpointError, OptionError
from septet.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Completion", "Sampling", "chat_prompt", "complete", "generate_tokens", "load", "measure_speed"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        max_new_tokens: at least 1.
        temperature: 0 takes the likeliest token; above 0 divides the logits.
        top_k: draw among the k likeliest; 0 means all.
        top_p: draw among the likeliest that hold this share of the probability, 0 < top_p <= 1.
        seed: of the private generator.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens must be at least 1", self.max_new_tokens),
            (self.temperature >= 0, "temperature must not be negative", self.temperature),
            (self.top_k >= 0, "top_k must not be negative", self.top_k),
            (0 < self.top_p <= 1, "top_p must be above 0 and at most 1", self.top_p),
        )
        for holds, requirement, got in checks:
            if not holds:
                raise OptionError(requirement, got, "correct the option")


@dataclass(frozen=True)
class Completion:
    """A finished text: `text`, how many tokens the prompt and it took, and the seconds of each part."""

    text: str
    prompt_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed after the prompt: new tokens but the first, which the prompt's pass gives."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else 0.0


def load(directory: str | Path, activations: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer for generation.

    Args:
        directory: a septet directory, a Hugging Face directory or a .gguf file.
        activations: "int8" or "float" for a septet directory; None is what the checkpoint asks for.

    Returns:
        (model, tokenizer), the model in its own dtype.

    Raises:
        CheckpointError, UnsupportedModelError, OptionError: as `septet.loading.load_model`.
    """
    path = Path(directory)
    tokenizer = load_tokenizer(path)
    return load_model(path, "auto", activations), tokenizer


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    """Turn a conversation into tokens with the model's chat template.

    Args:
        tokenizer: of the model.
        messages: {"role": "system" | "user" | "assistant", "content": text} in order.

    Returns:
        Token ids that end where the assistant's answer begins.

    Raises:
        CheckpointError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise CheckpointError("chat needs a chat template", "a tokenizer without one", "use `septet run`, which takes a raw prompt")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list[int],
    sampling: Sampling | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """Complete a prompt.

    Args:
        model, tokenizer: from `load`.
        prompt: raw text, or token ids from `chat_prompt`.
        sampling: how to draw; None is greedy, 128 tokens.
        on_text: called with each piece of text as soon as its characters are whole.

    Returns:
        The completion, without the prompt and special tokens.

    Raises:
        OptionError: the prompt is empty, or does not fit the model's positions.
    """
    sampling = sampling or Sampling()
    prompt_ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    pieces = _Pieces(tokenizer)
    started = time.perf_counter()
    first = None
    for token in generate_tokens(model, prompt_ids, sampling, stop=_stop_tokens(model, tokenizer)):
        first = first or time.perf_counter()
        piece = pieces.add(token)
        if piece and on_text is not None:
            on_text(piece)
    rest = pieces.finish()
    if rest and on_text is not None:
        on_text(rest)
    ended = time.perf_counter()
    first = first or ended
    return Completion(pieces.text, len(prompt_ids), len(pieces.ids), first - started, ended - first)


def generate_tokens(model: PreTrainedModel, prompt_ids: list[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
    """Yield new tokens until one of `stop` (which is not yielded), the limit, or the model's last position.

    Args:
        model: a causal language model of transformers.
        prompt_ids: at least one token.
        sampling: how to draw.
        stop: tokens that end the text.

    Yields:
        Token ids.

    Raises:
        OptionError: the prompt is empty or does not fit.
    """
    room = _room(model, len(prompt_ids))
    generator = torch.Generator().manual_seed(sampling.seed)
    tokens, cache = torch.tensor([prompt_ids]), None
    for _ in range(min(sampling.max_new_tokens, room)):
        # A generator must not hold inference_mode across a yield: it would leak into the caller.
        with torch.inference_mode():
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            token = _draw(output.logits[0, -1].float(), sampling, generator)
        if token in stop:
            return
        yield token
        tokens, cache = torch.tensor([[token]]), output.past_key_values


def measure_speed(model: PreTrainedModel, prompt_ids: list[int], new_tokens: int = 32) -> float:
    """Decode speed for one sequence, the prompt apart.

    Args:
        model: a causal language model.
        prompt_ids: at least one token.
        new_tokens: tokens to time, at least 1, after a first one that warms up.

    Returns:
        Tokens per second.
    """
    tokens = generate_tokens(model, prompt_ids, Sampling(max_new_tokens=new_tokens + 1))
    next(tokens)
    started = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - started)


def _draw(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token from logits float32 [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits, order = torch.sort(logits / sampling.temperature, descending=True, stable=True)
    if sampling.top_k:
        logits = logits[: sampling.top_k]
    probabilities = torch.softmax(logits, -1)
    # Keep the likeliest while those before hold less than top_p; the first always stays.
    probabilities[probabilities.cumsum(-1) - probabilities >= sampling.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def _room(model: PreTrainedModel, prompt_length: int) -> int:
    """How many tokens fit behind the prompt."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if prompt_length == 0:
        raise OptionError("a prompt must have at least one token", "an empty prompt", "write something")
    if limit is not None and prompt_length >= limit:
        raise OptionError(f"a prompt must be shorter than the model's {limit} positions", f"{prompt_length} tokens", "shorten the prompt")
    return limit - prompt_length if limit is not None else 1 << 30


def _stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(token for token in [*ends, tokenizer.eos_token_id] if token is not None)


class _Pieces:
    """Tokens to text, holding back characters whose bytes are not all there yet."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._tokenizer = tokenizer
        # Decoding restarts a little before the new token, so that spaces between tokens come out right.
        self._begin = self._shown = 0

    def add(self, token: int) -> str:
        self.ids.append(token)
        whole = self._decode(self._begin, len(self.ids))
        if whole.endswith("\ufffd"):
            return ""
        piece = whole[len(self._decode(self._begin, self._shown)) :]
        self._begin, self._shown = self._shown, len(self.ids)
        self.text += piece
        return piece

    def finish(self) -> str:
        piece = self._decode(self._begin, len(self.ids))[len(self._decode(self._begin, self._shown)) :]
        self._begin = self._shown = len(self.ids)
        self.text += piece
        return piece

    def _decode(self, begin: int, end: int) -> str:
        return self._tokenizer.decode(self.ids[begin:end], skip_special_tokens=True)
