"""Who reads and writes beside other work: a thread where a GPU works meanwhile, nobody where the processor does.

On a processor a thread brings no time, and what it allocates stays in a heap of its own: more than a gigabyte over a small model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager

__all__ = ["one_worker", "short_turns"]

#: Seconds that a thread of Python may go on while another one waits; usually it is 0.005.
_TURN = 0.0001


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


@contextmanager
def short_turns() -> Iterator[None]:
    """Let threads of the process take shorter turns until the end of the `with`: those that tell GPUs what to do, again and again for a
    few microseconds, would wait for one that computes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
