"""Threads for compiled loops that have let go of the interpreter lock.

numba has its own parallel loops, but its default layer ("workqueue") aborts the process when two Python threads enter it at
once, and the quantizer's pipeline does exactly that. So: one pool for the process, and every call cuts its range into steps
that whoever is free takes next. The calling thread works too, hence a busy pool slows a call down and can never block it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The pool of the process with this id: after a fork the threads of the parent are gone, so the child gets its own."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="halfbyte-codec")


def for_each_step(job: Callable[[int, int], None], count: int, step: int, threads: int) -> None:
    """Call job(begin, end) for every step of range(0, count, step), on up to `threads` threads, in any order.

    Returns when all are done; re-raises the first failure, after which no further step is started.
    """
    begins = iter(range(0, count, step))
    turn = threading.Lock()
    failed = threading.Event()

    def drain() -> None:
        while not failed.is_set():
            with turn:
                begin = next(begins, None)
            if begin is None:
                return
            try:
                job(begin, min(begin + step, count))
            except BaseException:
                failed.set()
                raise

    steps = -(-count // step)
    helpers = [_pool(os.getpid()).submit(drain) for _ in range(min(threads, steps) - 1)]
    try:
        drain()
    finally:
        running = [helper for helper in helpers if not helper.cancel()]
        errors = [error for helper in running if (error := helper.exception())]
    if errors:
        raise errors[0]
