"""Text from a model, one token at a time: through the native engine where it knows the model, else through transformers.

Both ways share the sampler, so options mean the same and nobody else's random state moves; the prompt and the tokens are timed
apart. torch is imported with the first model that needs it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from septet.checkpoint.source import is_gguf, is_septet
from septet.engine.sampling import Sampler, Sampling
from septet.engine.tokenizer import Pieces, Tokenizer, check_text
from septet.errors import CheckpointError, OptionError, UnsupportedModelError
from septet.kernels import available_backends, select_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from septet.engine import Engine
    from septet.gpu_engine import GpuEngine

    Model = PreTrainedModel | Engine | GpuEngine
    AnyTokenizer = PreTrainedTokenizerBase | Tokenizer

__all__ = ["ENGINES", "Completion", "Sampling", "chat_prompt", "complete", "encode", "generate_tokens", "load", "measure_speed"]

ENGINES = ("auto", "native", "transformers")


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


def load(
    directory: str | Path,
    activations: str | None = None,
    engine: str = "auto",
    on_fallback: Callable[[UnsupportedModelError], None] | None = None,
    device: str = "cpu",
) -> tuple[Model, AnyTokenizer]:
    """Load a model and its tokenizer for generation.

    Args:
        directory: a septet directory, a Hugging Face directory or a .gguf file.
        activations: "int8" or "float" for a septet directory; None is what the checkpoint asks for.
        engine: "native", "transformers", or "auto": the native engine where it knows the model.
        on_fallback: called with the reason when "auto" goes through transformers.
        device: "cpu", or a GPU of torch, "cuda" or "cuda:N"; there the native engine is `septet.gpu_engine`.

    Returns:
        (model, tokenizer): `septet.engine.Engine` and `Tokenizer`, or those of transformers, the model in its own dtype; or a `GpuEngine`.

    Raises:
        CheckpointError, UnsupportedModelError, OptionError: as `Engine.load` and `septet.loading.load_model`.
        OptionError: `engine` is unknown.
        UnsupportedModelError: "native", which does not know the model.
    """
    path = Path(directory)
    if engine not in ENGINES:
        raise OptionError(f"engine must be one of {', '.join(ENGINES)}", engine, "choose one of them")
    if device != "cpu":
        return _load_on_device(path, activations, engine, on_fallback, device)
    if engine != "transformers":
        try:
            return _load_native(path, activations)
        except UnsupportedModelError as error:
            if engine == "native":
                raise
            if on_fallback is not None:
                on_fallback(error)
    # Imports torch.
    from septet.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(path)
    return load_model(path, "auto", activations), tokenizer


def chat_prompt(tokenizer: AnyTokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Turn a conversation into tokens with the model's chat template.

    Args:
        tokenizer: of the model.
        messages: {"role": "system" | "user" | "assistant", "content": text} in order.

    Returns:
        Token ids that end where the assistant's answer begins.

    Raises:
        CheckpointError: the tokenizer has no chat template.
        OptionError: a message is not Unicode.
    """
    for message in messages:
        check_text(message["content"])
    if isinstance(tokenizer, Tokenizer):
        return tokenizer.chat(messages)
    if not tokenizer.chat_template:
        raise CheckpointError("chat needs a chat template", "a tokenizer without one", "use `septet run`, which takes a raw prompt")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: AnyTokenizer, prompt: str) -> list[int]:
    """Token ids of a raw prompt, with what the tokenizer puts around every text.

    Raises:
        OptionError: the prompt is not Unicode.
    """
    check_text(prompt)
    return tokenizer.encode(prompt) if isinstance(tokenizer, Tokenizer) else tokenizer(prompt)["input_ids"]


def complete(
    model: Model,
    tokenizer: AnyTokenizer,
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
    sampling, on_text = sampling or Sampling(), on_text or (lambda piece: None)
    prompt_ids = encode(tokenizer, prompt) if isinstance(prompt, str) else prompt
    if isinstance(tokenizer, Tokenizer):
        pieces, stop = Pieces(tokenizer.decode), tokenizer.stop_tokens
    else:
        pieces, stop = Pieces(lambda ids: tokenizer.decode(ids, skip_special_tokens=True)), _stop_tokens(model, tokenizer)
    started = time.perf_counter()
    first = None
    for token in generate_tokens(model, prompt_ids, sampling, stop):
        first = first or time.perf_counter()
        piece = pieces.add(token)
        if piece:
            on_text(piece)
    rest = pieces.finish()
    if rest:
        on_text(rest)
    ended = time.perf_counter()
    first = first or ended
    return Completion(pieces.text, len(prompt_ids), len(pieces.ids), first - started, ended - first)


def generate_tokens(model: Model, prompt_ids: list[int], sampling: Sampling, stop: frozenset[int] = frozenset()) -> Iterator[int]:
    """Yield new tokens until one of `stop` (which is not yielded), the limit, or the model's last position.

    Args:
        model: an engine, or a causal language model of transformers.
        prompt_ids: at least one token.
        sampling: how to draw.
        stop: tokens that end the text.

    Yields:
        Token ids.

    Raises:
        OptionError: the prompt is empty or does not fit.
    """
    if hasattr(model, "next_logits"):  # an engine, whose class needs the native extension or a GPU
        yield from model.generate(prompt_ids, sampling, stop)
        return
    import torch

    room = _room(model, len(prompt_ids))
    sampler = Sampler(sampling, prompt_ids)
    device = getattr(model, "device", None)
    tokens, cache = torch.tensor([prompt_ids], device=device), None
    for _ in range(min(sampling.max_new_tokens, room)):
        # A generator must not hold inference_mode across a yield: it would leak into the caller.
        with torch.inference_mode():
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
            token = sampler.draw(output.logits[0, -1].float().cpu().numpy())
        if token in stop:
            return
        yield token
        tokens, cache = torch.tensor([[token]], device=device), output.past_key_values


def measure_speed(model: Model, prompt_ids: list[int], new_tokens: int = 32) -> float:
    """Decode speed for one sequence, the prompt apart.

    Args:
        model: from `load`.
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


def _load_native(path: Path, activations: str | None) -> tuple[Engine, Tokenizer]:
    """The native engine for a septet directory; UnsupportedModelError when it is not the way."""
    hint = "run this model through transformers"
    if is_gguf(path) or not is_septet(path):
        raise UnsupportedModelError("for the native engine, a model must be quantized by septet", path, hint)
    if select_backend().NAME != "native":
        reason = available_backends()["native"] or "another one is forced"
        raise UnsupportedModelError("for the native engine, the native backend must be in use", reason, hint)
    # Needs the native extension, which has just been found.
    from septet.engine import Engine

    tokenizer = Tokenizer(path)
    return Engine.load(path, activations), tokenizer


def _load_on_device(
    path: Path, activations: str | None, engine: str, on_fallback: Callable[[UnsupportedModelError], None] | None, device: str
) -> tuple[Model, AnyTokenizer]:
    """A model of transformers on a device of torch, in a `GpuEngine` if that is the way."""
    from septet.loading import load_model, load_tokenizer

    tokenizer, model = load_tokenizer(path), load_model(path, "auto", activations).to(device)
    if engine == "transformers":
        return model, tokenizer
    from septet.gpu_engine import GpuEngine

    try:
        return GpuEngine(model), tokenizer
    except UnsupportedModelError as error:
        if engine == "native":
            raise
        if on_fallback is not None:
            on_fallback(error)
        return model, tokenizer


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
