"""How many threads Python code may use: the same rule as in the native kernels."""

from __future__ import annotations

import os

from septet.errors import OptionError

__all__ = ["default_threads"]

_MOST_THREADS = 1024


def default_threads() -> int:
    """SEPTET_THREADS, else OMP_NUM_THREADS (its first number), else the processors this process may use.

    Raises:
        OptionError: SEPTET_THREADS is not a positive number.
    """
    own, openmp = os.environ.get("SEPTET_THREADS", ""), os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if own and not _is_positive(own):
        raise OptionError("SEPTET_THREADS must be a positive number", repr(own[:80]), "correct the variable, or unset it")
    for text in (own, openmp):
        if _is_positive(text):
            return min(int(text), _MOST_THREADS)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _is_positive(text: str) -> bool:
    return text.isdecimal() and len(text) < 20 and int(text) > 0
