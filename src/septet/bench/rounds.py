"""What several rounds of one measurement say."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

__all__ = ["median", "spread"]


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest value, relative to the median."""
    return (max(values) - min(values)) / statistics.median(values)
