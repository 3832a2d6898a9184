"""One start of a run: alone in its folder, watched, and never without a last word."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline.config import provenance
from pipeline.config.exitcodes import CRASH
from pipeline.config.resolve import Plan
from pipeline.config.schema import RunConfig
from pipeline.core.errors import LaunchError
from pipeline.dist.group import Place, by_first
from pipeline.engine.stopping import StopRequest
from pipeline.engine.watchdog import Watchdog
from pipeline.record.beats import Pulse
from pipeline.record.failures import refuse_repetition, remember
from pipeline.record.lock import RunLock
from pipeline.record.state import INTERRUPTED, State, close_state, read_state, write_state
from pipeline.run.ending import ending

T = TypeVar("T")


@dataclass
class Attempt:
    """A start of the run: it has the folder, but has changed nothing of what a run says of itself until it begins."""

    folder: Path
    number: int
    """How often the run was started before."""
    pulse: Pulse
    config: str
    """Digest of the configuration."""
    begun: bool = False

    def begin(self, plan: Plan, stop: StopRequest) -> None:
        """Say that the run runs, on all ranks together.

        Args:
            plan: the run in numbers.
            stop: what an earlier start was asked is forgotten now.

        Raises:
            LaunchError: on every rank; the folder cannot be written.
        """

        def say() -> None:
            before = read_state(self.folder)
            stop.forget_old()
            self._running(before.step if before else 0)
            provenance.write(self.folder, plan)

        by_first(lambda: in_folder(self.folder, say))
        self.begun = True

    def saved(self, step: int) -> None:
        """Say that a checkpoint is there, on rank 0."""
        self._running(step)

    def _running(self, step: int) -> None:
        write_state(self.folder, State("running", None, step, self.number, config=self.config))


def in_folder(folder: Path, work: Callable[[], T]) -> T:
    """Do ``work``, which writes into a run folder.

    Raises:
        LaunchError: the system refuses.
    """
    try:
        return work()
    except OSError as error:
        raise LaunchError(f"cannot write the run folder {folder}: {error.strerror}; set run.folder") from error


@contextmanager
def attempt(config: RunConfig, place: Place) -> Iterator[Attempt]:
    """Have the run folder, and if what has begun there ends by an error, say how.

    That is written before the process group is left: the other ranks learn of a failure from connections that close,
    and the first to say why it failed is believed.

    Raises:
        LaunchError: on every rank; another job has the run folder, or the same step failed again and again.
    """
    folder = Path(config.run.folder)
    with ExitStack() as stack:
        lock = RunLock(folder) if place.first else None
        if lock is not None:
            stack.callback(lock.release)

        def take() -> int:
            assert lock is not None
            folder.mkdir(parents=True, exist_ok=True)
            lock.take()
            return _number(folder, digest)

        digest = provenance.digest(config)
        number = by_first(lambda: in_folder(folder, take))
        pulse = stack.enter_context(closing(in_folder(folder, lambda: Pulse(folder, place.rank, number))))
        watchdog = Watchdog(folder, pulse, config.engine.hang_minutes * 60, lock)
        watchdog.start()
        stack.callback(watchdog.stop)
        found = Attempt(folder, number, pulse, digest)
        try:
            yield found
        except Exception as error:
            if found.begun:
                code, text = ending(error, place.rank)
                close_state(folder, "failed", code, error=text, rank=place.rank, fault=pulse.last.step)
            raise
        except KeyboardInterrupt:
            if found.begun:
                close_state(folder, "failed", CRASH, error=INTERRUPTED, rank=place.rank, fault=pulse.last.step)
            raise


def _number(folder: Path, config: str) -> int:
    """How often the run was started before; how it ended the last time is noted."""
    before = read_state(folder)
    if before is None:
        return 0
    remember(folder, before)
    refuse_repetition(folder, config)
    return before.attempt + 1
