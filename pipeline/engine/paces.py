"""On rank 0: what all ranks say of their own time in each step's exchange, gathered in windows and judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from pipeline.record.paces import WINDOWS, Paces, Stragglers, Window


class PaceKeeper:
    """Writes the ranks' paces and says which of them stay slow.

    Args:
        folder: the run's.
        attempt: how often the run was started before.
        judge: of the ranks.
        minutes: after which a slow rank is named: a part of a window, in which it becomes slow, and whole ones.
        say: takes what there is to say.
        clock: seconds, of a clock that is never set.
    """

    def __init__(
        self,
        folder: Path,
        attempt: int,
        judge: Stragglers,
        minutes: float,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.attempt, self.judge, self.say, self.clock = folder, attempt, judge, say, clock
        self.window = minutes * 60 / (WINDOWS + 1)
        self._sums: Tensor | None = None
        self._steps = 0
        self._began = clock()

    def add(self, step: int, own: Tensor) -> None:
        """Take in a step.

        Args:
            step: its number.
            own: [W,P] on the host, float32: seconds of each rank and phase.
        """
        self._sums = own.double() if self._sums is None else self._sums + own
        self._steps += 1
        seconds = self.clock() - self._began
        if seconds < self.window:
            return
        window = Window(step, seconds / self._steps, (self._sums / self._steps).tolist())
        for text in self.judge.hear(window):
            self.say(text)
        paces = Paces(self.attempt, step, window.seconds, self.judge.nodes, window.own, [*self.judge.named.values()])
        with suppress(OSError):  # figures that the next window replaces are no reason to end
            paces.write(self.folder)
        self._sums, self._steps, self._began = None, 0, self.clock()
