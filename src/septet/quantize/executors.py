"""Who reads and writes beside other work: a thread where a GPU works meanwhile, nobody where the processor does.

On a processor a thread brings no time, and what it allocates stays in a heap of its own: more than a gigabyte over a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

__all__ = ["one_worker"]


class _AtOnce(Executor):
    """Does what it is given before `submit` returns, which raises what that raises."""

    def submit(self, work: Callable, /, *arguments: object, **named: object) -> Future:
        done: Future = Future()
        done.set_result(work(*arguments, **named))
        return done


def one_worker(beside: bool) -> Executor:
    """An executor that does one thing after the other.

    Args:
        beside: in a thread, beside what the caller does; otherwise at once, in the caller's.
    """
    return ThreadPoolExecutor(1) if beside else _AtOnce()
