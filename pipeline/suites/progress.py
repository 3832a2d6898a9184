"""How far a suite is: which evaluation, how far through which data, and how long that still takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from pipeline.core.evaluation import EvalStream
from pipeline.core.protocols import Batch
from pipeline.record.formats import duration

QUIET_SECONDS = 5.0
"""Plain lines are at least this far apart."""


class Progress:
    """A bar on a terminal, plain lines now and then elsewhere.

    Args:
        stream: where it is shown.
        quiet: show nothing, on other ranks than the first.
        clock: seconds.
    """

    def __init__(self, stream: TextIO, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._quiet, self._clock = stream, quiet, clock
        self._bar: RichProgress | None = None
        self._title = ""
        self._shown = -QUIET_SECONDS
        self._what = ""
        self._first = self._before = (0, 0.0)
        if not quiet and stream.isatty():
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"))
            self._bar = RichProgress(*columns, console=Console(file=stream), transient=True)
            self._task = self._bar.add_task("", total=None, left="")
            self._bar.start()

    def begin(self, name: str, number: int, total: int) -> None:
        """An evaluation begins, of a suite of ``total``; ``number`` from 0."""
        self._title = f"{name} ({number + 1} of {total})"
        self._show(self._title, "", 0.0, now=True)

    def show(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` samples of ``what`` are done; fewer than before: it begins anew."""
        now = self._clock()
        if what != self._what or done < self._before[0]:
            self._what, self._first = what, (done, now)
        self._before = (done, now)
        first, began = self._first
        left = f"{duration((now - began) / (done - first) * (total - done))} left" if first < done < total else ""
        self._show(f"{self._title}: {what}, {done / total:.0%} of {total:,}", left, done / total)

    def close(self) -> None:
        """Leave nothing on the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, text: str, left: str, share: float, *, now: bool = False) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, description=text, completed=share, total=1.0, left=left)
        elif now or self._clock() >= self._shown + QUIET_SECONDS:
            self._shown = self._clock()
            print("  ".join(filter(None, (text, left))), file=self._stream, flush=True)


class Shown:
    """A stream that tells how far it is.

    Args:
        name: of the stream.
        inner: the stream itself.
        world_size: ranks that share it.
        show: see :meth:`Progress.show`.
    """

    def __init__(self, name: str, inner: EvalStream, world_size: int, show: Callable[[str, int, int], None]) -> None:
        self.classes, self.samples, self.fingerprint = inner.classes, inner.samples, inner.fingerprint
        self._name, self._inner, self._world_size, self._show = name, inner, world_size, show

    def __iter__(self) -> Iterator[Batch]:
        """The stream's batches."""
        done = 0
        for batch in self._inner:
            yield batch
            done += len(batch["id"])
            self._show(self._name, min(self.samples, done * self._world_size), self.samples)
