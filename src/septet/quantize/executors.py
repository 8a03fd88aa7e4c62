"""Who reads and writes beside other work: a thread where a GPU works meanwhile, nobody where the processor does.

On a processor a thread brings no time, and what it allocates stays in a heap of its own: more than a gigabyte over a small model.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor

__all__ = ["workers"]


class _AtOnce(Executor):
    """Does what it is given before `submit` returns, which raises what that raises."""

    def submit(self, work: Callable, /, *arguments: object, **named: object) -> Future:
        done: Future = Future()
        done.set_result(work(*arguments, **named))
        return done


def workers(beside: bool, threads: int = 1) -> Executor:
    """An executor that begins with things in their order, one after the other or a few at a time.

    Args:
        beside: in threads, beside what the caller does; otherwise at once, in the caller's.
        threads: how many.
    """
    return ThreadPoolExecutor(threads) if beside else _AtOnce()
