"""The one thing that a run writes through. Rank 0 has a :class:`Recorder`; the other ranks have None."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.record.files import Lines
from pipeline.record.logger import Begun, Logger, make_logger, numbers
from pipeline.record.logs import console
from pipeline.record.metrics import MetricsLog, Value
from pipeline.record.notes import FILE as NOTES
from pipeline.record.progress import progress
from pipeline.record.showcase import read_pictures, save_pictures

if TYPE_CHECKING:
    from pipeline.core.protocols import Picture


class Recorder:
    """Writes metrics.jsonl, notes.jsonl, showcase/ and what loggers keep into a run's folder, and shows progress.

    Use it with :func:`contextlib.closing`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        attempt: int = 0,
        step: int = 0,
        config: str = "",
        loggers: Sequence[str] = ("tensorboard",),
    ) -> None:
        """Open the files; what an earlier attempt wrote stays.

        Args:
            folder: the run's, which exists.
            total_steps: updates at which the run is finished.
            attempt: how often the run was started before.
            step: updates that are done, as loaded from the checkpoint; loggers forget what came after it.
            config: the resolved configuration's text, for loggers.
            loggers: names of files in ``loggers/``.
        """
        self._folder = Path(folder)
        self._attempt = attempt
        self._metrics = MetricsLog(folder)
        self._notes = Lines(self._folder / NOTES)
        # A bar is drawn on the terminal itself; plain lines belong into the log, which comes to the console too.
        self._progress = progress(total_steps, console() if console().isatty() else sys.stderr)
        self._quality: dict[str, Value] = {}
        self._loggers: dict[str, Logger] = {}
        begun = Begun(self._folder, step, config)
        for name in loggers:
            self._guarded(name, lambda name=name: self._loggers.update({name: make_logger(name, begun)}))

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Record one log step. ``values`` are plain numbers (and texts, such as "data_digest"), in reading order."""
        self._metrics.append({"step": step, **values, "attempt": self._attempt})
        found = numbers(values)
        self._tell(lambda logger: logger.scalars(step, found))
        self._progress.update(step, {**values, **self._quality})

    def quality(self, step: int, values: Mapping[str, float], best: str | None) -> None:
        """Record what an evaluation has given; ``best``: the name of the one that people look at."""
        self._tell(lambda logger: logger.scalars(step, dict(values)))
        name = best if best in values else next(iter(values), None)
        if name is not None:
            self._quality = {"quality": f"{name} {values[name]:.4g}"}

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Record the objective's showcase at ``step``."""
        save_pictures(self._folder, step, pictures)
        for shown in read_pictures(self._folder)[step]:
            self._tell(lambda logger, shown=shown: logger.picture(step, shown))

    def _tell(self, what: Callable[[Logger], None]) -> None:
        """Do it with all loggers."""
        for name, logger in list(self._loggers.items()):
            self._guarded(name, lambda logger=logger: what(logger))

    def _guarded(self, name: str, work: Callable[[], None]) -> None:
        """Another program's failure does not end the training: that is said, and it is left out from then on."""
        try:
            work()
        except Exception as error:  # whatever it is: metrics.jsonl has everything
            self._loggers.pop(name, None)
            self.note(f"the logger {name} has failed and is left out until the next start: {error!r}")

    def note(self, text: str) -> None:
        """Record and show an event in words, such as a checkpoint that was passed over, and why."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._notes.append({"time": now, "attempt": self._attempt, "text": text})
        self._progress.note(text)

    def close(self) -> None:
        """Write out and close everything."""
        self._tell(lambda logger: logger.close())
        self._progress.close()
        self._notes.close()
        self._metrics.close()
