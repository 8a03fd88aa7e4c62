"""Windows at work side by side, each on one thread, so that the number of threads changes no bit.

A product spread over several threads may add in another order than on one. Here every window is computed by a single thread, and
results come back in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from septet.quantize.threads import default_threads

__all__ = ["WINDOWS_AT_ONCE", "map_windows"]

#: Windows whose results are held at the same time; fixed, since sums over them are.
WINDOWS_AT_ONCE = 8
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


def map_windows(
    work: Callable[[_Item], _Result], items: Sequence[_Item], threads: int = 0, gradients: bool = False
) -> Iterator[list[_Result]]:
    """Apply `work` to all items.

    Args:
        work: called in worker threads, with torch on one thread each.
        items: one per window.
        threads: 0 is the default number; the results do not depend on it.
        gradients: let torch record what it needs for a backward pass.

    Yields:
        The results of `WINDOWS_AT_ONCE` items at a time, in order.
    """

    def quietly(item: _Item) -> _Result:
        with torch.set_grad_enabled(gradients):
            return work(item)

    with ThreadPoolExecutor(min(threads or default_threads(), WINDOWS_AT_ONCE)) as pool:
        for start in range(0, len(items), WINDOWS_AT_ONCE):
            with _one_thread_each():
                results = list(pool.map(quietly, items[start : start + WINDOWS_AT_ONCE]))
            yield results


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """New threads take over torch's number of threads; it is process-wide, so it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
