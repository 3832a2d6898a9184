"""How far long work is: a bar with rate, rejects and time left; a plain line now and then without a terminal."""

from __future__ import annotations

import sys
import time
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
            self._bar.stop()

    def counts(self, counts: Counts) -> None:
        """Show a build's counts."""
        self.update(counts.inputs, counts.inputs - counts.resumed, f", {counts.rejects:,} rejected")

    def update(self, done: int, lately: int | None = None, note: str = "") -> None:
        """Show ``done`` of the total; ``lately`` of them since the beginning, by which the rate is measured."""
        now = time.monotonic()
        if now - self._shown < (LINE_EVERY if self._bar is None else BAR_EVERY):
            return
        self._shown = now
        rate = (done if lately is None else lately) / (now - self._began)
        text = f"{done:,} {self._unit}, {rate:,.0f}/s{note}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=text)
            return
        left = ""
        if self._total and rate > 0:
            minutes, seconds = divmod(int((self._total - done) / rate), 60)
            left = f", {minutes // 60}:{minutes % 60:02d}:{seconds:02d} left"
        print(f"{self._title}: {text}{left}", file=sys.stderr, flush=True)
