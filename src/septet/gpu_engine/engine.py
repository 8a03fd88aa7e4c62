"""A model that decodes on a GPU: the prompt through transformers, then a CUDA graph per token.

The graph holds the embedding, the kernel that takes a token through all layers, the head, and the choice of the likeliest token, so a
greedy text needs the processor only to hand out tokens. Other draws happen on the processor, like those of the other engines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from septet.engine.sampling import Sampler, Sampling
from septet.errors import OptionError, UnsupportedModelError
from septet.gpu.token import TokenKernel
from septet.gpu_engine.reading import read_blocks, read_rotary, read_sizes
from septet.layer import SeptetLinear

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedModel

__all__ = ["GpuEngine"]

#: Caches are made for multiples of so many tokens, so that texts of similar lengths share a graph.
_ROOM = 512


class GpuEngine:
    """A loaded model. One text at a time, on one stream.

    Args:
        model: of transformers, on a GPU, in eval mode.
        length: tokens that the first cache has room for; it grows with the texts.

    Attributes:
        model: the same.
        context: most tokens of a text.
        kernel: with the cache of the text.
        logits: float32 [vocabulary] on the GPU, after the last step.

    Raises:
        UnsupportedModelError: the model is not on a GPU, or the decode kernel does not know such a model.
    """

    def __init__(self, model: PreTrainedModel, length: int = _ROOM) -> None:
        if model.device.type != "cuda":
            raise UnsupportedModelError("for decoding on the GPU, the model must be on one", model.device, "move it: model.cuda()")
        # refuses other families, whose configs may lack what follows
        self._sizes = read_sizes(model, length)
        self.model = model
        self.context: int = model.config.max_position_embeddings
        self._token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
        self._make(min(length, self.context))

    @property
    def config(self) -> Any:
        """As of the model."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """As of the model."""
        return self.model.generation_config

    @torch.inference_mode()
    def next_logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits after the last token of a text: float32 [vocabulary].

        Args:
            tokens: token ids, at least one, fewer than `context`.

        Raises:
            OptionError: no token, or too many.
        """
        return self._read(tokens)

    def generate(self, prompt: Sequence[int], sampling: Sampling | None = None, stop: frozenset[int] = frozenset()) -> Iterator[int]:
        """Yield new tokens until one of `stop` (which is not yielded), the limit, or the end of the context.

        Args:
            prompt: token ids, at least one.
            sampling: how to draw; None is greedy, 128 tokens.
            stop: tokens that end the text.

        Yields:
            Token ids.

        Raises:
            OptionError: the prompt is empty or does not fit.
        """
        sampling = sampling or Sampling()
        self._check(prompt)
        count = min(sampling.max_new_tokens, self.context - len(prompt))
        if len(prompt) + count > self.kernel.cache.shape[3]:
            self._make(min(-(-(len(prompt) + count) // _ROOM) * _ROOM, self.context))
        sampler = Sampler(sampling, list(prompt))
        greedy = sampling.temperature == 0 and sampling.repetition_penalty == 1
        token = sampler.draw(self.next_logits(prompt))
        for index in range(count):
            if token in stop:
                return
            yield token
            if index + 1 == count:
                return
            # A generator must not hold inference_mode across a yield: it would leak into the caller.
            with torch.inference_mode():
                if index == 0 or not greedy:
                    self.give(token)
                else:
                    self.step()
                token = int(self._token) if greedy else sampler.draw(self.logits.cpu().numpy())

    def step(self) -> None:
        """One more token, the one that was likeliest after the last: replays the graph. `logits` are then those that follow.

        Raises:
            OptionError: the cache is full: `kernel.cache.shape[3]` tokens.
        """
        self.kernel.position.advance()
        with torch.cuda.device(self.model.device):
            self._graph.replay()

    @torch.inference_mode()
    def give(self, token: int) -> None:
        """One more token of a text, as in `step`; `logits` are then those that follow.

        Raises:
            OptionError: as `step`.
        """
        self._token.fill_(token)
        self.step()

    def _check(self, prompt: Sequence[int]) -> None:
        if not 0 < len(prompt) < self.context:
            hint = "write something" if len(prompt) == 0 else "shorten the prompt"
            raise OptionError(f"a prompt must have 1 to {self.context - 1} tokens", len(prompt), hint)

    def _read(self, prompt: Sequence[int]) -> np.ndarray:
        """Logits after a prompt, whose keys and values go into the cache."""
        self._check(prompt)
        if len(prompt) > self.kernel.cache.shape[3]:
            self._make(min(-(-len(prompt) // _ROOM) * _ROOM, self.context))
        output = self.model(input_ids=torch.tensor([list(prompt)], device=self.model.device), use_cache=True, logits_to_keep=1)
        for index, layer in enumerate(output.past_key_values.layers):
            self.kernel.cache[index, 0, :, : len(prompt)] = layer.keys[0]
            self.kernel.cache[index, 1, :, : len(prompt)] = layer.values[0]
        self.kernel.position.move_to(len(prompt))
        return output.logits[0, -1].float().cpu().numpy()

    @torch.inference_mode()
    def _make(self, length: int) -> None:
        """The kernel with a cache for texts of `length` tokens, and its graph."""
        with torch.cuda.device(self.model.device):
            sizes = replace(self._sizes, length=length)
            blocks = read_blocks(self.model, sizes)
            self.kernel = TokenKernel(blocks, sizes, self.model.model.norm.weight, read_rotary(self.model, length))
            # the graph knows addresses only, of what an operator made of a packed head, too
            head = self.model.lm_head
            self._head = head.on_gpu() if isinstance(head, SeptetLinear) else None
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
            torch.cuda.current_stream().wait_stream(stream)
            self.kernel.position.move_to(0)
            self._graph = torch.cuda.CUDAGraph()
            # without a stream it takes one that torch made once, perhaps of another GPU
            with torch.cuda.graph(self._graph, stream=stream):
                self._step()
            # a captured step did nothing on the device
            self.kernel.position.move_to(0)

    def _step(self) -> None:
        embedded = self.model.get_input_embeddings()(self._token)
        self.logits = self.model.lm_head(self.kernel.run(embedded)).float()[0, 0]
        self._token.copy_(self.logits.argmax())
