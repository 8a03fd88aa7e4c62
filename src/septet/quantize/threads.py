"""How many threads Python code may use: the same rule as in the native kernels."""

from __future__ import annotations

import os

__all__ = ["default_threads"]


def default_threads() -> int:
    """SEPTET_THREADS, else OMP_NUM_THREADS, else the number of CPUs."""
    for variable in ("SEPTET_THREADS", "OMP_NUM_THREADS"):
        text = os.environ.get(variable, "")
        if text.isdigit() and int(text) > 0:
            return int(text)
    return os.cpu_count() or 1
