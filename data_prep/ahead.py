"""Work on many things at once, a few ahead of where its results are used, in order."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(pool: Executor, work: Callable[[T], R], things: Iterable[T], ahead: int) -> Iterator[tuple[T, R]]:
    """Each thing with what ``work`` makes of it; unlike ``pool.map``, at most ``ahead`` are begun and not yet used."""
    begun: deque[tuple[T, Future[R]]] = deque()
    for thing in things:
        begun.append((thing, pool.submit(work, thing)))
        if len(begun) > ahead:
            first, future = begun.popleft()
            yield first, future.result()
    while begun:
        first, future = begun.popleft()
        yield first, future.result()


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0))


def processes(workers: int, module: str) -> ProcessPoolExecutor:
    """Worker processes that end with this one, however it ends; ``module``, which they need, is imported once."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["__main__", module])
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_follow_parent)


def _follow_parent() -> None:
    """Leave Ctrl-C, which goes to the whole group, to the parent; and end with it, also when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's workers hold both ends of their queue, so they would wait for a dead parent's next batch for ever."""
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
