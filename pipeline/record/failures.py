"""``failures.jsonl``: how attempts of a run failed, and the guard against failing at the same step for ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.config.exitcodes import CONFIG
from pipeline.core.errors import LaunchError
from pipeline.record.beats import read_beats
from pipeline.record.files import Lines, read_lines
from pipeline.record.state import INTERRUPTED, State

FILE = "failures.jsonl"
LIMIT = 3
"""Failures at one step in a row after which a run is not started again."""


@dataclass(frozen=True)
class Failure:
    """An attempt that did not end well."""

    attempt: int
    step: int
    """That was being made; see :class:`pipeline.record.beats.Beat`."""
    exit_code: int | None
    """None: it was killed, and could not say."""
    error: str | None
    rank: int | None
    """Where it was seen first."""
    config: str | None = None
    """Digest of the configuration."""


def read_failures(folder: Path) -> list[Failure]:
    """Oldest first."""
    return [Failure(**line) for line in read_lines(folder / FILE)[0]]


def remember(folder: Path, before: State) -> None:
    """Note how the last attempt failed, if it did, before the next one begins.

    A mistake of the user's (exit code 2) does not count: it is not started again by itself, but when it is mended.
    Nor does it that somebody lost patience.
    """
    if before.outcome not in ("running", "failed") or before.exit_code == CONFIG or before.error == INTERRUPTED:
        return
    if any(failure.attempt == before.attempt for failure in read_failures(folder)[-1:]):
        return
    beats = [beat for beat in read_beats(folder) if beat.attempt == before.attempt]
    step = before.fault if before.fault is not None else max((b.step for b in beats), default=before.step)
    lines = Lines(folder / FILE)
    lines.append(asdict(Failure(before.attempt, step, before.exit_code, before.error, before.rank, before.config)))
    lines.close()


def repeated(steps: Sequence[int | None]) -> bool:
    """Whether the last failures were :data:`LIMIT` of the same step.

    Ranks may be one step apart when one of them dies, and whose step is known is chance: so steps next to each other
    count as the same.

    Args:
        steps: at which failures in a row happened, the last one last; None: before the first.
    """
    last = steps[-LIMIT:]
    known = [step for step in last if step is not None]
    if len(last) < LIMIT or len(known) not in (0, LIMIT):
        return False
    return not known or max(known) - min(known) <= 1


def refuse_repetition(folder: Path, config: str) -> None:
    """Do not start again what has just failed several times at the same step, unless it was mended meanwhile.

    Args:
        folder: the run's.
        config: digest of the configuration.

    Raises:
        LaunchError: it has.
    """
    last = read_failures(folder)[-LIMIT:]
    same = all(failure.config in (None, config) for failure in last)
    if same and repeated([failure.step for failure in last]):
        error = next((f.error for f in reversed(last) if f.error), "the processes were killed without a word")
        raise LaunchError(
            f"step {last[-1].step} of {folder} has failed {LIMIT} times in a row, last with: {error}. "
            f"Starting again would fail again; mend the cause, then remove {folder / FILE} and start again"
        )
