"""A model behind one native call per token: read from a septet directory, its texts kept in caches.

A cache keeps its text between calls: a prompt that begins like the text before it pays only for what is new. Several texts can go on
together, one token each per call, and then the weights are read once for all of them. Neither changes a bit of any logit, because the
native code computes every token the same way wherever a call begins and whatever stands beside it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from septet import _native
from septet.checkpoint.description import quantization_of
from septet.checkpoint.directory import open_directory
from septet.engine.sampling import Sampler, Sampling
from septet.engine.shape import ModelShape, read_shape
from septet.engine.weights import fill
from septet.errors import OptionError

__all__ = ["ACTIVATIONS", "CACHES", "MAX_TEXTS", "Engine"]

ACTIVATIONS = ("int8", "float")
CACHES = ("float16", "float32", "int8")
MAX_TEXTS = 4096


class Engine:
    """A loaded model; `load` makes one. One call at a time: calls from several threads wait for each other.

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
        # What the native texts are known to begin with: never ahead of them, so an interruption anywhere leaves both usable.
        self._texts: list[list[int]] = [[]]
        self._lock = threading.RLock()

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
            cache: "float16", "float32" or "int8" (with a scale per key and per value), how keys and values are kept.
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
            raise OptionError(f"cache must be one of {', '.join(CACHES)}", cache, "choose one of them")
        context = shape.positions if context is None else context
        if not 1 <= context <= shape.positions:
            raise OptionError(f"context must be in 1..{shape.positions}, the positions of the model", context, "choose another")
        sizes = (
            shape.layers, shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.vocabulary, context,
        )  # fmt: skip
        native = _native.Engine(sizes, shape.epsilon, activations == "float", cache)
        fill(native, opened, shape, quantization)
        return cls(native, shape, context, threads)

    @property
    def memory_bytes(self) -> dict[str, int]:
        """Bytes of `weights` and of the `cache` at its present size, all texts together."""
        return dict(zip(("weights", "cache"), self._native.memory()))

    def reset(self) -> None:
        """Forget all texts."""
        with self._lock:
            for text in range(len(self._texts)):
                self._keep(text, 0)
            self._texts = [[]]

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after every token of a text.

        Args:
            tokens: token ids, at least one, at most `context`.

        Returns:
            float32 [len(tokens), vocabulary].

        Raises:
            OptionError: no token, one outside the vocabulary, or too many.
        """
        ids = _as_tokens(tokens)
        with self._lock:
            self.reset()
            return self._append(ids, len(ids))

    def next_logits(self, tokens: Sequence[int], text: int = 0) -> np.ndarray:
        """The logits after the last token of a text; the beginning that the cache holds already costs nothing.

        Args:
            tokens: as in `logits`.
            text: which cache to use, 0 to MAX_TEXTS - 1.

        Returns:
            float32 [vocabulary].

        Raises:
            OptionError: as in `logits`.
        """
        ids = _as_tokens(tokens)
        if not 0 <= text < MAX_TEXTS:
            raise OptionError(f"a text must be in 0..{MAX_TEXTS - 1}", text, "choose another")
        with self._lock:
            self._texts += ([] for _ in range(text + 1 - len(self._texts)))
            known = min(_common_length(self._texts[text], ids), len(ids) - 1)
            self._keep(text, known)
            return self._append(ids[known:], 1, text)[0]

    def step(self, tokens: Mapping[int, int]) -> np.ndarray:
        """Append one token to each of several texts; the weights are read once for all of them.

        Args:
            tokens: text -> token; `next_logits` has been called for each of the texts.

        Returns:
            float32 [len(tokens), vocabulary]: the logits that follow, in the order of `tokens`.

        Raises:
            OptionError: no text, one without a prompt, one that is full, or a token outside the vocabulary.
        """
        ids = _as_tokens(list(tokens.values()))
        with self._lock:
            strangers = [text for text in tokens if not 0 <= text < len(self._texts) or not self._texts[text]]
            if strangers:
                raise OptionError("a text must begin with a prompt", f"text {strangers[0]} without one", "call next_logits first")
            for text in tokens:
                self._keep(text, len(self._texts[text]))
            logits = self._native.step(np.array(list(tokens), np.int64), ids, self.threads)
            for text, token in tokens.items():
                self._texts[text].append(int(token))
            return logits

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
        self._check_room(prompt)
        text = [int(token) for token in _as_tokens(prompt)]
        sampler = Sampler(sampling, text)
        for _ in range(min(sampling.max_new_tokens, self.context - len(text))):
            token = sampler.draw(self.next_logits(text))
            if token in stop:
                return
            yield token
            text.append(token)

    def generate_batch(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None, stop: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Continue several prompts together; each text is the one that `generate` would give for it alone.

        Args:
            prompts: token ids, at least one each; at most MAX_TEXTS.
            sampling: how to draw, with a generator per text; None is greedy, 128 tokens.
            stop: tokens that end a text.

        Returns:
            The new tokens of each prompt.

        Raises:
            OptionError: as `generate`, or there are too many prompts.
        """
        sampling = sampling or Sampling()
        if len(prompts) > MAX_TEXTS:
            raise OptionError(f"at most {MAX_TEXTS} prompts fit", len(prompts), "give fewer at once")
        for prompt in prompts:
            self._check_room(prompt)
        samplers = [Sampler(sampling, [int(token) for token in prompt]) for prompt in prompts]
        logits = {text: self.next_logits(prompt, text) for text, prompt in enumerate(prompts)}
        made: list[list[int]] = [[] for _ in prompts]
        while logits:
            drawn = {text: samplers[text].draw(row) for text, row in logits.items()}
            going = {}
            for text, token in drawn.items():
                if token in stop:
                    continue
                made[text].append(token)
                if len(made[text]) < min(sampling.max_new_tokens, self.context - len(prompts[text])):
                    going[text] = token
            logits = dict(zip(going, self.step(going))) if going else {}
        return made

    def _check_room(self, prompt: Sequence[int]) -> None:
        if len(prompt) >= self.context:
            raise OptionError(f"a prompt must be shorter than the model's {self.context} positions", f"{len(prompt)} tokens", "shorten it")

    def _keep(self, text: int, known: int) -> None:
        """Forget all but the first `known` tokens of a text, and what an interrupted call left behind them."""
        del self._texts[text][known:]
        if self._native.length(text) > known:
            self._native.truncate(known, text)

    def _append(self, ids: np.ndarray, wanted: int, text: int = 0) -> np.ndarray:
        logits = self._native.append(ids, wanted, self.threads, text)
        self._texts[text] += ids.tolist()
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
