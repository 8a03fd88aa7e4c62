"""Judging a candidate on text that the model writes itself, so that no text is needed."""

from __future__ import annotations

from pathlib import Path

__all__ = ["divergence_on_own_text"]

_WINDOWS = 16
_CONTEXT = 512


def divergence_on_own_text(source: str, candidate: Path, seed: int, threads: int = 0, device: str = "cpu") -> float:
    """The mean KL divergence of a candidate from its original.

    Args:
        source: path or hub id of the original.
        candidate: a septet directory.
        seed: of the text; another one than that of the calibration.
        threads: 0 is the default number; the text does not depend on it.
        device: where the text is written.

    Returns:
        nats per token, over the second halves of a few windows, float32 and float activations.
    """
    from septet import loading
    from septet.cli.calibration import write_windows
    from septet.cli.device import machine_of
    from septet.evaluation.scoring import score_models
    from septet.evaluation.windows import Windows

    original = loading.load_model(loading.resolve_source(source), "float32")
    context = min(_CONTEXT, getattr(original.config, "max_position_embeddings", None) or _CONTEXT)
    tokens = write_windows(original, (_WINDOWS, context), seed, machine_of(threads, device), lambda event: None)
    model = loading.load_model(candidate, "float32", "float")
    return score_models(model, Windows(tokens, context // 2, False), original, None)["kld_mean"]
