"""``[online]``: how good the run is, every so often; which checkpoint is best; and whether it is time to end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pipeline.config.resolve import period
from pipeline.core.protocols import Clock
from pipeline.dist.group import by_first, from_first
from pipeline.engine.actions import Action
from pipeline.engine.watch import Watch
from pipeline.record.found import Row
from pipeline.record.quality import Quality, read_quality, value_of
from pipeline.suites.online import Online

if TYPE_CHECKING:
    from pipeline.run.train import Job

SECONDS = "online_seconds"
"""In the metrics: what evaluations took since the line before."""


class Judge:
    """Evaluates a run as it goes on, and draws the conclusions. All ranks together.

    Args:
        job: the run.
        watch: whether it goes on.
        step: updates done.

    Raises:
        ConfigError: of the suite.
        DataError: what was kept of the best metric is damaged.
    """

    def __init__(self, job: Job, watch: Watch, step: int) -> None:
        assert job.config.online is not None
        self.job, self.watch, self.settings = job, watch, job.config.online
        self.online = Online(job.config, job.facts, job.tokenizer, job.place)
        self.ended = False
        """The metric has not become better for as long as [online] has patience."""
        self._quality: Quality | None = None
        if (metric := self.settings.best) is not None:
            self._quality = by_first(lambda: read_quality(job.folder, metric, step))
            self._pin(self._quality.best)
        job.meter.spend(SECONDS, 0.0)

    def actions(self) -> list[Action]:
        """Before an update, so that a run that is killed in one does it again; and after the last update."""
        every = period(self.job.plan, self.settings.every)
        return [
            Action("online", every, self.look, at_end=False, ahead=True),
            Action("online", 0, self._last),
        ]

    def look(self, clock: Clock) -> None:
        """Evaluate, and draw the conclusions."""
        began, job = time.perf_counter(), self.job
        self.watch.settle()
        rows, problems = self.online.evaluate(job.engine, clock.step, lambda: job.meter.at("online"))
        if job.recorder is not None:
            job.recorder.quality(clock.step, _numbers(rows), self.settings.best)
            for problem in problems:
                job.recorder.note(f"evaluation at step {clock.step} has failed: {problem}")
        if self._quality is not None and clock.step > 0:
            self._conclude(self._quality, rows, clock)
        job.meter.spend(SECONDS, time.perf_counter() - began)

    def _last(self, clock: Clock) -> None:
        if clock.samples >= clock.total_samples:
            self.look(clock)

    def _conclude(self, quality: Quality, rows: list[Row], clock: Clock) -> None:
        """Keep the best checkpoint; see whether the run has come to its end."""
        job, there = self.job, False
        if job.recorder is not None:
            row = value_of(quality.metric, rows)
            if row is None:
                known = ", ".join(dict.fromkeys(row.metric for row in rows)) or "nothing"
                job.recorder.note(f"online.best: the suite gives no one number {quality.metric!r} but {known}")
            else:
                quality.add(clock.step, row.value, row.better or "higher")
                quality.write(job.folder)
            there = job.saver.store.path(clock.step).exists()
        best, waited, there = from_first((quality.best, quality.without_gain, there))
        if best == clock.step and not there and job.saver.last != clock.step:
            job.checkpoint(clock)
        self._pin(best)
        if self.settings.patience and waited >= self.settings.patience and clock.samples < clock.total_samples:
            self.ended = self.watch.stopping = True
            if job.recorder is not None:
                job.recorder.note(
                    f"{quality.metric} has not become better since step {best}, in {waited} evaluations: the run ends "
                    f"at step {clock.step} (online.patience)"
                )

    def _pin(self, best: int | None) -> None:
        self.job.saver.pinned = set() if best is None else {best}


def _numbers(rows: list[Row]) -> dict[str, float]:
    """By name, with the data set's where there are several."""
    several = len({row.data_name for row in rows}) > 1
    return {f"{row.data_name}/{row.metric}" if several and row.data_name else row.metric: row.value for row in rows}
