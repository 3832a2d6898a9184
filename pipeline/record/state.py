"""``state.json``: where a run is and how it ended, for the launcher, ``sluice status`` and the report."""

from __future__ import annotations

import errno
import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.core.files import replace_file
from pipeline.record.files import dumps

FILE = "state.json"
INTERRUPTED = "ended by Ctrl-C, before it could save"
"""The error of a run that a person ended at once."""
Outcome = Literal["running", "finished", "failed", "requeue"]


@dataclass(frozen=True)
class State:
    """What is known of a run between two updates of the file."""

    outcome: Outcome
    exit_code: int | None
    """None while it runs; the meaning of codes is in :mod:`pipeline.config.exitcodes`."""
    step: int
    """Updates done at the last checkpoint, or at the end."""
    attempt: int
    """How often the run was started before."""
    error: str | None = None
    time: str = ""
    """Of this entry; set on writing."""
    rank: int | None = None
    """Where a failure was seen first."""
    fault: int | None = None
    """Step at which it failed, as its beats say (:mod:`pipeline.record.beats`)."""
    config: str | None = None
    """Digest of the configuration of this attempt."""


def read_state(folder: Path) -> State | None:
    """The last entry; None when there is none, or none that can be read (it says nothing that matters for resuming)."""
    try:
        return State(**json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_state(folder: Path, state: State) -> None:
    """Replace the entry, at once."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    data = dumps(asdict(replace(state, time=now)), indent=1).encode() + b"\n"
    try:
        replace_file(folder / FILE, data)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        # That the disk is full must be said nevertheless: the old entry's block takes the new one.
        with open(folder / FILE, "r+b") as file:
            file.write(data)
            file.truncate()


def close_state(folder: Path, outcome: Outcome, exit_code: int, **facts: Any) -> None:
    """Write how the run ended, unless another rank has: the first one knows the cause, the rest its consequences.

    Args:
        folder: the run's.
        outcome: of this attempt.
        exit_code: of this process.
        facts: further fields of :class:`State`; those left out stay as they are.
    """
    state = read_state(folder)
    if state is not None and state.outcome == "running":
        write_state(folder, replace(state, outcome=outcome, exit_code=exit_code, **facts))
