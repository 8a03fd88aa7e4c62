"""Judge a model on a text: perplexity, divergence from a reference, bits per weight.

Nothing is random: the same command gives the same figures on the same machine with the same number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from septet.evaluation.scoring import score_models
from septet.evaluation.storage import effective_bits
from septet.evaluation.windows import cut_windows
from septet.loading import load_model, load_tokenizer

__all__ = ["EvaluationResult", "evaluate"]


@dataclass(frozen=True)
class EvaluationResult:
    """Figures of one evaluation; standard errors are over windows.

    Attributes:
        perplexity, perplexity_stderr: of the model, on the scored tokens.
        reference_perplexity: of the reference, None without one. So are the next four.
        kld_mean, kld_stderr, kld_p99: KL(reference || model) per position in nats: mean, its error, 99th percentile.
        top1_agreement: share of positions where both put the same token first, 0 to 1.
        tokens: scored tokens. `windows` x `context` tokens were read.
        score: "half" or "all" of each window; `starts_with_bos` says whether BOS replaced its first token.
        compute: dtype of all arithmetic outside the quantized layers, the same for model and reference.
        effective_bits, effective_bits_total: bits per weight on disk, of the linear layers and of everything.
        seconds: wall time, loading included.
    """

    perplexity: float
    perplexity_stderr: float
    reference_perplexity: float | None
    kld_mean: float | None
    kld_stderr: float | None
    kld_p99: float | None
    top1_agreement: float | None
    tokens: int
    windows: int
    context: int
    score: str
    starts_with_bos: bool
    compute: str
    effective_bits: float | None
    effective_bits_total: float | None
    seconds: float

    def as_dict(self) -> dict:
        """The fields as a JSON object."""
        return asdict(self)


def evaluate(
    directory: str | Path,
    text: str,
    reference: str | Path | None = None,
    context: int = 512,
    score: str = "half",
    activations: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Evaluate a model on a text.

    Args:
        directory: a septet directory, an unquantized Hugging Face directory or a .gguf file.
        text: the text itself; at least two windows of it.
        reference: the model to compare with, of the same kinds. Its tokenizer is then used for both.
        context: tokens per window.
        score: "half" scores the second half of each window, as llama.cpp does; "all" every position.
        activations: "int8" or "float" for a septet directory; None is what the checkpoint asks for.
        progress: called with (windows done, windows) after each window.

    Returns:
        The figures.

    Raises:
        OptionError: an option is unknown, or the text is too short.
        CheckpointError: a model cannot be loaded, or the two have different vocabularies.
        UnsupportedModelError: a path is no model.
    """
    started = time.perf_counter()
    directory = Path(directory)
    source = directory if reference is None else Path(reference)
    windows = cut_windows(load_tokenizer(source), text, context, score)
    model = load_model(directory, torch.float32, activations)
    other = None if reference is None else load_model(source, torch.float32)
    figures = score_models(model, windows, other, progress)
    linear_bits, total_bits = effective_bits(directory, _linear_layers(model))
    return EvaluationResult(
        **figures,
        tokens=len(windows.tokens) * windows.scored,
        windows=len(windows.tokens),
        context=context,
        score=score,
        starts_with_bos=windows.starts_with_bos,
        compute="float32",
        effective_bits=linear_bits,
        effective_bits_total=total_bits,
        seconds=time.perf_counter() - started,
    )


def _linear_layers(model: torch.nn.Module) -> list[str]:
    """Names of the unquantized linear layers, the head apart."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head]
