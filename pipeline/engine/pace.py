"""A rank's own time for a step, by phase: what it takes without what it waits for others.

``data`` and ``step`` are read from the device where that is a GPU, of one step a second at most: all of them would
cost more than they tell. What is done between steps is timed by the host, which then has the device's results.
"""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

from pipeline.dist.waits import Waits
from pipeline.record.paces import PHASES

LAP_SECONDS = 1.0
"""On a GPU, from the start of one step that is measured to the next."""


class _Lap(NamedTuple):
    """A step on a GPU."""

    marks: list[torch.cuda.Event]
    """When the wait for data began, the step began, and it ended."""
    waits: list[tuple[torch.cuda.Event, torch.cuda.Event]]

    def seconds(self) -> tuple[float, float]:
        """Of data and step; all events are over."""
        begun, at_work, ended = self.marks
        waited = sum(first.elapsed_time(last) for first, last in self.waits)
        return begun.elapsed_time(at_work) / 1e3, (at_work.elapsed_time(ended) - waited) / 1e3


class Pace:
    """Measures this rank's own time.

    Args:
        waits: of this process.
    """

    def __init__(self, waits: Waits) -> None:
        self.waits = waits
        self._own = dict.fromkeys(PHASES, 0.0)
        self._phase = "other"
        self._began, self._waited = time.perf_counter(), waits.seconds
        self._lap: _Lap | None = None
        self._lap_began = -LAP_SECONDS
        self._device: tuple[float, float] = (0.0, 0.0)
        """Data and step of the last lap that was read."""

    def at(self, phase: str) -> None:
        """A phase begins; see :class:`pipeline.record.beats.Beat`."""
        self._close(phase if phase in PHASES else "other")
        if self.waits.device.type == "cuda":
            self._mark(phase)

    def take(self) -> tuple[float, ...]:
        """The step ends: seconds of each phase since the last one did, as :data:`PHASES` has them."""
        self._close("other")
        if self.waits.device.type == "cuda":
            self._read()
            self._own["data"], self._own["step"] = self._device
        taken = tuple(self._own.values())
        self._own = dict.fromkeys(PHASES, 0.0)
        return taken

    def _close(self, phase: str) -> None:
        """Count what has passed for the phase that ends."""
        now, waited = time.perf_counter(), self.waits.seconds
        self._own[self._phase] += now - self._began - (waited - self._waited)
        self._phase, self._began, self._waited = phase, now, waited

    def _mark(self, phase: str) -> None:
        now = time.perf_counter()
        if phase == "data" and self._lap is None and now - self._lap_began >= LAP_SECONDS:
            self._lap, self._lap_began = _Lap([self.waits.mark()], []), now
        elif phase == "step" and self._lap is not None and len(self._lap.marks) == 1:
            self._lap.marks.append(self.waits.mark())
            self.waits.events = self._lap.waits

    def _read(self) -> None:
        """End the lap with its step; read it once the device is through."""
        lap = self._lap
        if lap is None:
            return
        if len(lap.marks) == 2:
            self.waits.events = None
            lap.marks.append(self.waits.mark())
        elif len(lap.marks) == 3 and lap.marks[-1].query():
            self._device, self._lap = lap.seconds(), None
