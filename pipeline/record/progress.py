"""How a run shows itself to the person who waits: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from pipeline.record.formats import duration, short
from pipeline.record.metrics import Value

QUIET_SECONDS = 5.0
"""Plain lines are at least this far apart."""


class Progress(Protocol):
    """What :func:`progress` gives."""

    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Show that ``step`` updates are done."""
        ...

    def note(self, text: str) -> None:
        """Show a line of text that stays."""
        ...

    def close(self) -> None:
        """Show what has not been shown yet, and end."""
        ...


def facts(values: Mapping[str, Value]) -> str:
    """ "loss 0.4312  1.2k samples/s  data wait 3%", with what ``values`` holds of it."""
    parts = []
    if "loss" in values:
        parts.append(f"loss {short(float(values['loss']))}")
    if "samples_per_second" in values:
        parts.append(f"{short(float(values['samples_per_second']), 3)} samples/s")
    if "data_wait" in values:
        parts.append(f"data wait {float(values['data_wait']):.0%}")
    if "quality" in values:
        parts.append(str(values["quality"]))
    return "  ".join(parts)


class TimeLeft:
    """Estimates the time left from the speed over the last few log steps, so that a change of speed shows soon."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=20)

    def update(self, step: int) -> str:
        """ "12 m 5 s left"; empty until there are two log steps, and at the end."""
        now = self._clock()
        self._seen.append((step, now))
        first, then = self._seen[0]
        if step >= self._total or step <= first:
            return ""
        return duration((now - then) / (step - first) * (self._total - step)) + " left"


class Bar:
    """A bar that is drawn again in place."""

    def __init__(self, total_steps: int, stream: TextIO, left: TimeLeft) -> None:
        columns = (
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}", markup=False),
            TextColumn("[bold]{task.fields[left]}"),
        )
        self._bar = RichProgress(*columns, console=Console(file=stream), expand=True)
        self._task = self._bar.add_task("", total=total_steps, facts="starting", left="")
        self._left = left
        self._bar.start()

    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Draw the bar at ``step``."""
        self._bar.update(self._task, completed=step, facts=facts(values), left=self._left.update(step))

    def note(self, text: str) -> None:
        """Print above the bar."""
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.stop()


class Plain:
    """A line at a log step, not more often than every few seconds, and always the last."""

    def __init__(self, total_steps: int, stream: TextIO, left: TimeLeft, clock: Callable[[], float]) -> None:
        self._total = total_steps
        self._stream = stream
        self._left = left
        self._clock = clock
        self._next = clock()
        self._waiting = ""

    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Print, or keep for :meth:`close`."""
        parts = (f"step {step:,}/{self._total:,}", facts(values), self._left.update(step))
        self._waiting = "  ".join(filter(None, parts))
        if step >= self._total or self._clock() >= self._next:
            self._show()

    def _show(self) -> None:
        self.note(self._waiting)
        self._waiting = ""
        self._next = self._clock() + QUIET_SECONDS

    def note(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Print the last line, if it is still waiting."""
        if self._waiting:
            self._show()


def progress(total_steps: int, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> Progress:
    """A bar when ``stream`` is a terminal, plain lines otherwise."""
    left = TimeLeft(total_steps, clock)
    return Bar(total_steps, stream, left) if stream.isatty() else Plain(total_steps, stream, left, clock)
