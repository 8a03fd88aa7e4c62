"""A model behind one native call per token: read from a septet directory, its text kept in a cache.

The cache keeps its text between calls: a prompt that begins like the text before it pays only for what is new. This changes no
bit of any logit, because the native code computes every token the same way wherever a call begins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from septet import _native
from septet.checkpoint.description import quantization_of
from septet.checkpoint.directory import open_directory
from septet.engine.sampling import Sampler, Sampling
from septet.engine.shape import ModelShape, read_shape
from septet.engine.weights import fill
from septet.errors import OptionError

__all__ = ["ACTIVATIONS", "CACHES", "Engine"]

ACTIVATIONS = ("int8", "float")
CACHES = ("float16", "float32")


class Engine:
    """A loaded model; `load` makes one. One text at a time: calls from several threads wait for each other.

    Attributes:
        shape: sizes of the model.
        context: most tokens of a text.
        threads: how many threads may work; 0 is the default of the kernels. Changes no bit.
    """

    def __init__(self, native: _native.Engine, shape: ModelShape, context: int, threads: int = 0) -> None:
        self.shape = shape
        self.context = context
        self.threads = threads
        self._native = native
        self._text: list[int] = []

    @classmethod
    def load(
        cls,
        directory: str | Path,
        activations: str | None = None,
        cache: str = "float16",
        context: int | None = None,
        threads: int = 0,
    ) -> Engine:
        """Read a septet directory.

        Args:
            directory: what `septet quantize` wrote.
            activations: "int8" or "float"; None is what the checkpoint asks for.
            cache: "float16" or "float32", how keys and values are kept.
            context: most tokens of a text; None is what the model was made for. Memory is taken as a text grows.
            threads: how many threads may work; 0 is the default of the kernels.

        Raises:
            CheckpointError: a file or tensor is missing, damaged, or contradicts another.
            UnsupportedModelError: septet did not quantize it, or the engine does not know such a model.
            SpecVersionError: another version of the format.
            OptionError: an argument is unknown or out of range.
        """
        opened = open_directory(Path(directory))
        quantization = quantization_of(opened.config, str(directory))
        shape = read_shape(opened.config)
        activations = quantization.get("activations") if activations is None else activations
        if activations not in ACTIVATIONS:
            raise OptionError("activations must be int8 or float", activations, "choose one of the two")
        if cache not in CACHES:
            raise OptionError("cache must be float16 or float32", cache, "choose one of the two")
        context = shape.positions if context is None else context
        if not 1 <= context <= shape.positions:
            raise OptionError(f"context must be in 1..{shape.positions}, the positions of the model", context, "choose another")
        sizes = (
            shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary, context,
        )  # fmt: skip
        native = _native.Engine(sizes, shape.epsilon, activations == "float", cache == "float32")
        fill(native, opened, shape, quantization)
        return cls(native, shape, context, threads)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of `weights` and of the `cache` at its present size."""
        return dict(zip(("weights", "cache"), self._native.memory()))

    def reset(self) -> None:
        """Forget the text."""
        self._native.truncate(0)
        self._text = []

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after every token of a text.

        Args:
            tokens: token ids, at least one, at most `context`.

        Returns:
            float32 [len(tokens), vocabulary].

        Raises:
            OptionError: no token, one outside the vocabulary, or too many.
        """
        self.reset()
        return self._append(_as_tokens(tokens), len(tokens))

    def next_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after the last token of a text; the beginning that the cache holds already costs nothing.

        Args:
            tokens: as in `logits`.

        Returns:
            float32 [vocabulary].

        Raises:
            OptionError: as in `logits`.
        """
        ids = _as_tokens(tokens)
        known = min(_common_length(self._text, ids), len(ids) - 1)
        if known < len(self._text):
            self._native.truncate(known)
            del self._text[known:]
        return self._append(ids[known:], 1)[0]

    def generate(self, prompt: Sequence[int], sampling: Sampling | None = None, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield new tokens until one of `stop` (which is not yielded), the limit, or the end of the context.

        Args:
            prompt: token ids, at least one.
            sampling: how to draw; None is greedy, 128 tokens.
            stop: tokens that end the text.

        Yields:
            Token ids.

        Raises:
            OptionError: the prompt is empty, does not fit, or holds a token outside the vocabulary.
        """
        sampling = sampling or Sampling()
        if len(prompt) >= self.context:
            raise OptionError(f"a prompt must be shorter than the model's {self.context} positions", f"{len(prompt)} tokens", "shorten it")
        text = [int(token) for token in _as_tokens(prompt)]
        sampler = Sampler(sampling, text)
        for _ in range(min(sampling.max_new_tokens, self.context - len(text))):
            token = sampler.draw(self.next_logits(text))
            if token in stop:
                return
            yield token
            text.append(token)

    def _append(self, ids: np.ndarray, wanted: int) -> np.ndarray:
        logits = self._native.append(ids, wanted, self.threads)
        self._text += ids.tolist()
        return logits


def _as_tokens(tokens: Sequence[int]) -> np.ndarray:
    """int32 [n]; what does not fit 32 bits is outside every vocabulary."""
    if len(tokens) == 0:
        raise OptionError("a prompt must have at least one token", "an empty prompt", "write something")
    ids = np.asarray(tokens)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise OptionError("tokens must be whole numbers in one row", f"{ids.dtype} {list(ids.shape)}", "use the ids of the tokenizer")
    return np.ascontiguousarray(np.clip(ids, -1, 2**31 - 1), np.int32)


def _common_length(text: list[int], ids: np.ndarray) -> int:
    """How many tokens two texts share at their beginning."""
    count = min(len(text), len(ids))
    differ = np.flatnonzero(np.asarray(text[:count], np.int32) != ids[:count])
    return int(differ[0]) if len(differ) else count
