"""A run started as a person starts it, what is done to it from outside, and the clock of a fault."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.core.protocols import Clock
from pipeline.record.beats import Beat, read_beats
from pipeline.run import train as training
from tests.integration.runs import SMOKE, overrides

ROOT = Path(__file__).parents[2]
PATIENCE = 200.0
STEPS, MIDDLE = 60, 15
ZERO = ("engine.name=deepspeed", "engine.zero=1", "engine.precision=fp32")
LONG = [*ZERO, f"run.length={STEPS}ba", "every.checkpoint=10ba", "run.keep=9"]
"""Long enough to be met in the middle, after a checkpoint."""


class Launched:
    """``sluice train`` with the launcher between it and its ranks."""

    def __init__(self, folder: Path, shards: Path, *more: str, procs: int = 2) -> None:
        self.folder = folder
        self.attempt = max((b.attempt for b in read_beats(folder)), default=-1) + 1
        command = [sys.executable, "-m", "launch", "train", str(SMOKE / "supervised.toml"), "--procs", str(procs)]
        for setting in overrides(folder, shards, *LONG, *more):
            command += ["--set", setting]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        self.process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)

    def beats(self) -> list[Beat]:
        """Of this start."""
        return [b for b in read_beats(self.folder) if b.attempt == self.attempt]

    def wait_for_step(self, step: int, ranks: int = 2) -> list[Beat]:
        """Wait until all ranks are beyond ``step``; returns their beats."""

        def there() -> list[Beat]:
            beats = self.beats()
            return beats if len(beats) == ranks and all(b.step > step and b.phase != "start" for b in beats) else []

        return wait_until(there, f"step {step}", lambda: self.process.poll() is None)

    def wait(self) -> tuple[int, str]:
        """Exit code, and what it said on stderr."""
        said = self.process.communicate(timeout=PATIENCE)[1].decode()
        return self.process.returncode, said


@contextmanager
def launched(*arguments: Any, **options: Any) -> Iterator[Launched]:
    """A run of which nothing is left afterwards."""
    run = Launched(*arguments, **options)
    try:
        yield run
    finally:
        if run.process.poll() is None:  # its guard kills the rest
            run.process.kill()
            run.process.communicate()


def wait_until(condition: Callable[[], Any], what: str, possible: Callable[[], bool] = lambda: True) -> Any:
    """What ``condition`` gives as soon as it is true."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, f"no {what} in {PATIENCE} s"
        assert possible(), f"no {what} any more"
        time.sleep(0.01)
    return found


def gone(pid: int) -> bool:
    """Whether a process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except FileNotFoundError:
        return True


def note_time(folder: Path, what: str) -> None:
    """Write down when something happened, the first time."""
    path = folder / f"time-of-{what}"
    if not path.exists():
        path.write_text(str(time.time()))


def die(job_folder: Path) -> None:
    """SIGKILL, with the time noted."""
    note_time(job_folder, "fault")
    os.kill(os.getpid(), signal.SIGKILL)


def note_first_step() -> None:
    """In a rank: note the time of the first step that it trains."""
    log = training.Job.log

    def then_note(job: Any, clock: Clock) -> None:
        note_time(job.folder, "training")
        log(job, clock)

    training.Job.log = then_note  # type: ignore[method-assign]


def recovery(folder: Path) -> float:
    """Seconds from the fault to the next training step."""
    fault, again = (float((folder / f"time-of-{what}").read_text()) for what in ("fault", "training"))
    return again - fault
