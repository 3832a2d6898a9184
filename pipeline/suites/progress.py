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
        total: tasks of the suite, on all subjects.
        quiet: show nothing, on other ranks than the first.
        clock: seconds.
    """

    def __init__(
        self, stream: TextIO, total: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream, self._quiet, self._clock = stream, quiet, clock
        self._total, self._done, self._worked = total, 0, 0
        self._seconds, self._began = 0.0, 0.0
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

    def begin(self, name: str) -> None:
        """The next task begins."""
        self._title = f"{name} ({self._done + 1} of {self._total})"
        self._began = self._clock()
        self._show(self._title, self._left(0.0), 0.0, now=True)

    def end(self, *, worked: bool = True) -> None:
        """It has ended; ``worked``: it had something to do, and tells how long the others will take."""
        self._done += 1
        if worked:
            self._worked += 1
            self._seconds += self._clock() - self._began

    def skip(self, tasks: int) -> None:
        """So many tasks will not be done."""
        self._done += tasks

    def _left(self, seconds: float) -> str:
        """How long the suite still takes.

        Args:
            seconds: that the present task still takes.
        """
        others = self._total - self._done - 1
        if not others or not self._worked:
            return ""
        return f"{duration(seconds + others * self._seconds / self._worked)} for all"

    def show(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` samples of ``what`` are done; fewer than before: it begins anew."""
        now = self._clock()
        if what != self._what or done < self._before[0]:
            self._what, self._first = what, (done, now)
        self._before = (done, now)
        first, began = self._first
        seconds = (now - began) / (done - first) * (total - done) if first < done < total else 0.0
        left = [f"{duration(seconds)} left"] if seconds else []
        left += filter(None, [self._left(seconds)])
        self._show(f"{self._title}: {what}, {done / total:.0%} of {total:,}", ", ".join(left), done / total)

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
