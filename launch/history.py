"""``RUN/launch/jobs.jsonl``: what was submitted for a run, and how each attempt at it ended; only ever appended to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pipeline.core.files import replace_file
from pipeline.record.files import Lines

FOLDER = "launch"
"""In the run's folder: all that launching keeps."""
FILE = "jobs.jsonl"
BAD_NODES = "bad_nodes.json"
CANCELLED = "cancelled"
"""Holds the number of a job whose owner wants it to save and end, however long saving takes."""
Action = Literal["finished", "requeue", "restart", "stop"]


@dataclass(frozen=True)
class Submitted:
    """A job was put into the queue."""

    time: str
    job: str
    """SLURM's number of the job; of an array, the array's."""
    cluster: str
    """Name of the profile."""
    nodes: int
    time_limit: str | None
    config: str
    """The file that was submitted."""
    command: Sequence[str]
    """What submits it again: ["submit", ...]."""
    name: str = ""
    """Of the job in SLURM."""
    run: str = ""
    """The folder that this stands in, so that it is not believed of a copy."""
    kind: Literal["submitted"] = "submitted"


@dataclass(frozen=True)
class Attempt:
    """The ranks were started once, and have ended."""

    job: str
    restart: int
    """How often SLURM had queued the job again."""
    nodes: Sequence[str]
    start: str
    end: str
    exit_code: int
    step: int | None
    """That it had reached or died in; None when no rank got so far."""
    decision: Action
    reason: str
    excluded: Sequence[str] = ()
    """Nodes that the job must not run on again."""
    kind: Literal["attempt"] = "attempt"


def now() -> str:
    """The time as it stands in the file."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def append(run: Path, entry: Submitted | Attempt) -> None:
    """Add a line to the history of a run."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    with closing(Lines(run / FOLDER / FILE)) as lines:
        lines.append(asdict(entry))


def read(run: Path) -> list[Submitted | Attempt]:
    """The history of a run, the oldest first; torn lines are left out."""
    try:
        text = (run / FOLDER / FILE).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for line in text.split("\n") if (entry := _parse(line)) is not None]


def _parse(line: str) -> Submitted | Attempt | None:
    try:
        row: dict[str, Any] = json.loads(line)
        kind = {"submitted": Submitted, "attempt": Attempt}[row["kind"]]
        known = {f.name for f in fields(kind)}
        return kind(**{name: value for name, value in row.items() if name in known})
    except (ValueError, KeyError, TypeError):
        return None


def last_submitted(entries: Sequence[Submitted | Attempt], run: Path) -> Submitted | None:
    """What was submitted last, for this folder and not for one that it was copied from or was called before."""
    last = next((entry for entry in reversed(entries) if isinstance(entry, Submitted)), None)
    return last if last is None or last.run in ("", os.path.realpath(run)) else None


def last_job(run: Path) -> str | None:
    """The number of that job."""
    last = last_submitted(read(run), run)
    return last.job if last else None


def attempts(run: Path) -> list[Attempt]:
    """How the attempts ended, the oldest first."""
    return [entry for entry in read(run) if isinstance(entry, Attempt)]


def bad_nodes(run: Path) -> dict[str, str]:
    """Nodes that were lost or failed the preflight, with the reason."""
    try:
        return json.loads((run / FOLDER / BAD_NODES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def ask_to_end(run: Path, job: str) -> None:
    """Tell a job's agent that its owner wants it to end."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    replace_file(run / FOLDER / CANCELLED, f"{job}\n".encode())


def asked_to_end(run: Path, job: str) -> bool:
    """Whether the owner of a job has said so."""
    try:
        return (run / FOLDER / CANCELLED).read_text(encoding="utf-8").strip() == job
    except OSError:  # asked five times a second for weeks, over a network: the next answer is soon enough
        return False


def add_bad_nodes(run: Path, found: Mapping[str, str]) -> None:
    """Remember nodes that are not to be used again for this run."""
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    text = json.dumps(bad_nodes(run) | dict(found), indent=1)
    replace_file(run / FOLDER / BAD_NODES, text.encode() + b"\n")
