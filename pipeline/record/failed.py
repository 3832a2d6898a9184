"""Evaluations that have failed: a word of each stays with the results until the same one ends well.

``results/TASK-MARK.failed``, a file each, as records are; MARK is a hash of the names of task and model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pipeline.core.files import replace_file
from pipeline.record.found import Failed
from pipeline.record.records import FOLDER, files_of, slug


class Ended(NamedTuple):
    """How an evaluation of a model has ended."""

    task: str
    """As the suite calls it."""
    model: str
    failure: str | None
    """In words; None: it ended well."""


def keep_failures(folder: str | os.PathLike[str], ended: Sequence[Ended]) -> None:
    """Write a word of what has failed, and forget what failed before and ended well now.

    Raises:
        OSError: the disk takes no more.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # Of several of one name, such as an evaluation with other settings, one that failed is told of.
    for task, model, failure in sorted(ended, key=lambda one: one.failure is not None):
        mark = hashlib.sha256(json.dumps([task, model]).encode()).hexdigest()[:16]
        path = Path(folder) / FOLDER / f"{slug(task)}-{mark}.failed"
        if failure is None:
            path.unlink(missing_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            body = {"task": task, "model": model, "text": failure, "time": now}
            replace_file(path, (json.dumps(body, indent=1) + "\n").encode())


def read_failures(folder: str | os.PathLike[str]) -> tuple[Failed, ...]:
    """What has failed and not ended well since, in the order of time; a damaged file is passed over."""
    found: list[Failed] = []
    for path in files_of(Path(folder), ".failed"):
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            found.append(Failed(*(str(body[name]) for name in Failed._fields)))
        except (OSError, ValueError, KeyError, TypeError):  # its words are lost, which changes no number
            continue
    return tuple(sorted(found, key=lambda one: one.time))
