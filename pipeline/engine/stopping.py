"""Requests to stop before the end: signals and a stop file. The ranks agree on them in the loop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType

from pipeline.core.files import stamp

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STOP_FILE = "stop"
OLD_STOP = "SLUICE_OLD_STOP"
"""Environment variable: the stamp of a stop file that was there before this start, so that it is not for this one."""


class StopRequest:
    """Whether this rank was asked to stop. The handler only sets a flag: the loop acts when all ranks know."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / STOP_FILE
        self.old = os.environ.get(OLD_STOP) or stamp(self.file)
        self.reason: str | None = None
        self.interrupted = False

    def forget_old(self) -> None:
        """Remove what an earlier start was asked, but not what this one was asked while it began."""
        if self.old is not None and stamp(self.file) == self.old:
            self.file.unlink(missing_ok=True)

    def listen(self) -> None:
        """Take the stop signals; a second SIGINT interrupts at once."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            # Not "asked already": one request may come as the stop file or as another signal too, and is to save.
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
        self.reason = signal.Signals(number).name

    def asked(self) -> bool:
        """Whether a signal came or the stop file is there."""
        if self.reason is None and self.file.exists():
            self.reason = f"{self.file} exists"
        return self.reason is not None
