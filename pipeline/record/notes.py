"""``notes.jsonl``: what a run has said of itself in words, and what people have said of it; only ever appended to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.core.errors import LaunchError
from pipeline.record.files import Lines, read_lines

FILE = "notes.jsonl"


@dataclass(frozen=True)
class Remarks:
    """What people have said of a run."""

    tags: tuple[str, ...] = ()
    """Those that were given and not taken away, in the order in which they came."""
    note: str = ""
    """The last one."""


def remark(folder: Path, author: str, text: str, tags: Sequence[str], untags: Sequence[str]) -> Remarks:
    """Add a person's note to a run, and give or take away tags. Safe while the run is at work.

    Args:
        folder: of the run.
        author: who says it.
        text: of the note; empty: none.
        tags: to give.
        untags: to take away.

    Returns:
        What holds now.

    Raises:
        LaunchError: the folder cannot be written.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    changed = [*(f"tag {tag}" for tag in tags), *(f"tag {tag} taken away" for tag in untags)]
    row: dict[str, Any] = {"time": now, "author": author, "text": text or ", ".join(changed)}
    row |= {"note": text} if text else {}
    row |= {"tag": list(tags), "untag": list(untags)} if changed else {}
    try:
        with closing(Lines(folder / FILE)) as lines:
            lines.append(row)
    except OSError as error:
        raise LaunchError(f"cannot write {folder / FILE}: {error.strerror}") from error
    return read_remarks(folder)


def read_remarks(folder: Path) -> Remarks:
    """What people have said of a run so far; what it has said itself is left out."""
    tags: dict[str, None] = {}
    note = ""
    for row in read_lines(folder / FILE)[0]:
        note = row.get("note", note)
        tags |= dict.fromkeys(_words(row.get("tag", ())))
        for tag in _words(row.get("untag", ())):
            tags.pop(tag, None)
    return Remarks(tuple(tags), note)


def _words(value: Iterable[Any]) -> list[str]:
    return [str(word) for word in value]
