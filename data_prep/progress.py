"""How far a long piece of work is: a bar with rate and time left; a plain line now and then without a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from data_prep.build import Counts

LINE_EVERY = 30.0
"""Seconds between lines when there is no terminal."""
BAR_EVERY = 0.2


class Progress:
    """Shows on standard error how far something is."""

    def __init__(self, title: str, total: int | None, unit: str = "inputs") -> None:
        self._title = title
        self._total = total
        self._unit = unit
        self._bar: Any = None
        self._began = self._shown = time.monotonic()
        self._state: tuple[int, int, str] | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            columns = ("{task.description}", BarColumn(), "{task.percentage:>3.0f}%", TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(self._title, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._show_bar()  # where it came to, not where it was a moment before
            self._bar.stop()

    def counts(self, counts: Counts) -> None:
        """Show a build's counts."""
        self.update(counts.inputs, counts.inputs - counts.resumed, f", {counts.rejects:,} rejected")

    def of(self, done: int, total: int) -> None:
        """Show ``done`` of a total that is known by now."""
        self._total = total
        self.update(done)

    def update(self, done: int, lately: int | None = None, note: str = "") -> None:
        """Show ``done`` of the total; ``lately`` of them since the beginning, by which the rate is measured."""
        self._state = (done, done if lately is None else lately, note)
        now = time.monotonic()
        if now - self._shown < (LINE_EVERY if self._bar is None else BAR_EVERY):
            return
        self._shown = now
        if self._bar is not None:
            self._show_bar()
        else:
            print(f"{self._title}: {self._text()}{self._left()}", file=sys.stderr, flush=True)

    def _show_bar(self) -> None:
        if self._state is not None:
            self._bar.update(self._task, completed=self._state[0], total=self._total, note=self._text())

    def _text(self) -> str:
        assert self._state is not None
        done, _, note = self._state
        return f"{done:,} {self._unit}, {self._rate():,.0f}/s{note}"

    def _rate(self) -> float:
        """Per second, since the beginning."""
        assert self._state is not None
        return self._state[1] / max(1e-9, time.monotonic() - self._began)

    def _left(self) -> str:
        assert self._state is not None
        if not self._total or self._rate() <= 0:
            return ""
        return f", {_clock(max(0, self._total - self._state[0]) / self._rate())} left"


def _clock(duration: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(int(duration), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


@contextmanager
def waiting(title: str) -> Iterator[None]:
    """Show that something is under way of which nobody knows how long it takes."""
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(title):
            yield
        return
    done = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while not done.wait(LINE_EVERY):
            print(f"{title}: {_clock(time.monotonic() - began)} so far", file=sys.stderr, flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
