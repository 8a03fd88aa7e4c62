"""What a quantized model lost: perplexity, divergence from the original, bits per weight."""

from __future__ import annotations

from septet.evaluation.report import EvaluationResult, evaluate
from septet.evaluation.scoring import score_models
from septet.evaluation.windows import Windows, cut_windows

__all__ = ["EvaluationResult", "Windows", "cut_windows", "evaluate", "score_models"]
