"""Work on many things at once, a few ahead of where its results are used, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
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
