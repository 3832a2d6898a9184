"""One start of a run: alone in its folder, watched, and never without a last word."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import provenance
from pipeline.config.resolve import Plan
from pipeline.config.schema import RunConfig
from pipeline.core.errors import LaunchError
from pipeline.dist.group import Place, by_first
from pipeline.engine.watchdog import Watchdog
from pipeline.record.beats import Pulse
from pipeline.record.failures import refuse_repetition, remember
from pipeline.record.lock import RunLock
from pipeline.record.state import State, close_state, read_state, write_state
from pipeline.run.ending import ending


@dataclass(frozen=True)
class Attempt:
    """A start of the run."""

    number: int
    """How often the run was started before."""
    pulse: Pulse


@contextmanager
def attempt(config: RunConfig, plan: Plan, place: Place) -> Iterator[Attempt]:
    """Say that the run runs, and in the end, if it ends by an error, how it ended.

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

        def begin() -> int:
            assert lock is not None
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.take()
                return _begin(folder, config, plan)
            except OSError as error:
                raise LaunchError(f"cannot write the run folder {folder}: {error.strerror}; set run.folder") from error

        number = by_first(begin)
        pulse = stack.enter_context(closing(Pulse(folder, place.rank, number)))
        watchdog = Watchdog(folder, pulse, config.engine.hang_minutes * 60, lock)
        watchdog.start()
        stack.callback(watchdog.stop)
        try:
            yield Attempt(number, pulse)
        except Exception as error:
            code, text = ending(error, place.rank)
            close_state(folder, "failed", code, error=text, rank=place.rank, fault=pulse.last.step)
            raise


def _begin(folder: Path, config: RunConfig, plan: Plan) -> int:
    """Note how the attempt before ended and that this one runs; returns how often the run was started before."""
    before = read_state(folder)
    if before is not None:
        remember(folder, before)
        refuse_repetition(folder)
    number = before.attempt + 1 if before else 0
    write_state(folder, State("running", None, before.step if before else 0, number))
    provenance.write(folder, config, plan)
    return number
