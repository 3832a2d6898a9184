"""The one thing that a run writes through. Rank 0 has a :class:`Recorder`; the other ranks have None."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.record.files import Lines
from pipeline.record.logs import console
from pipeline.record.metrics import MetricsLog, Value
from pipeline.record.notes import FILE as NOTES
from pipeline.record.progress import progress
from pipeline.record.showcase import save_pictures

if TYPE_CHECKING:
    from pipeline.core.protocols import Picture

TENSORBOARD = "tensorboard"


class Recorder:
    """Writes metrics.jsonl, notes.jsonl, showcase/ and tensorboard/ in a run's folder, and shows progress on stderr.

    Use it with :func:`contextlib.closing`.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, total_steps: int, attempt: int = 0, step: int = 0, config: str = ""
    ) -> None:
        """Open the files; what an earlier attempt wrote stays.

        Args:
            folder: the run's, which exists.
            total_steps: updates at which the run is finished.
            attempt: how often the run was started before.
            step: updates that are done, as loaded from the checkpoint; TensorBoard hides what it shows from after it.
            config: the resolved configuration's text, for TensorBoard.
        """
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        self._folder = Path(folder)
        self._attempt = attempt
        self._metrics = MetricsLog(folder)
        self._notes = Lines(self._folder / NOTES)
        self._board = SummaryWriter(str(self._folder / TENSORBOARD), purge_step=step + 1)
        if config:
            self._board.add_text("config", f"```toml\n{config}\n```", step)
        # A bar is drawn on the terminal itself; plain lines belong into the log, which comes to the console too.
        self._progress = progress(total_steps, console() if console().isatty() else sys.stderr)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Record one log step. ``values`` are plain numbers (and texts, such as "data_digest"), in reading order."""
        self._metrics.append({"step": step, **values, "attempt": self._attempt})
        for name, value in values.items():
            if not isinstance(value, str):
                self._board.add_scalar(name, value, step)
        self._progress.update(step, values)

    def pictures(self, step: int, pictures: Mapping[str, Picture]) -> None:
        """Record the objective's showcase at ``step``."""
        save_pictures(self._folder, step, pictures)
        for name, picture in pictures.items():
            self._board.add_image(f"showcase/{name}", picture.image, step, dataformats="HWC")

    def note(self, text: str) -> None:
        """Record and show an event in words, such as a checkpoint that was passed over, and why."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._notes.append({"time": now, "attempt": self._attempt, "text": text})
        self._progress.note(text)

    def close(self) -> None:
        """Write out and close everything."""
        self._progress.close()
        self._board.close()
        self._notes.close()
        self._metrics.close()
