"""How many threads Python code may use, the same rule as in the native kernels; and how numpy's products share them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from typing import TypeVar

from threadpoolctl import ThreadpoolController

from septet.errors import OptionError

__all__ = ["default_threads", "one_blas_thread", "parallel_map"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

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


def one_blas_thread() -> AbstractContextManager[object]:
    """Let numpy's products run on the calling thread until the end of the `with`.

    Threads of BLAS look out for work for a while after each product, and take processors from others meanwhile: that is dear where
    small products and the native encoder take turns.
    """
    return _blas().limit(limits=1, user_api="blas")


def parallel_map(work: Callable[[_Item], _Result], items: Sequence[_Item], threads: int = 0) -> list[_Result]:
    """Apply `work` to all items, each on a thread of its own; a single one has all threads of numpy's products.

    Args:
        work: called in worker threads; numpy lets them run at the same time.
        items: what to work on.
        threads: 0 is the default number.

    Returns:
        The results in the order of the items, the same with any number of threads if `work` is.
    """
    if len(items) < 2:
        return [work(item) for item in items]
    with one_blas_thread(), ThreadPoolExecutor(min(threads or default_threads(), len(items))) as pool:
        return list(pool.map(work, items))


@cache
def _blas() -> ThreadpoolController:
    """The BLAS that numpy has loaded; looking for it takes a moment."""
    return ThreadpoolController()


def _is_positive(text: str) -> bool:
    return text.isdecimal() and len(text) < 20 and int(text) > 0
