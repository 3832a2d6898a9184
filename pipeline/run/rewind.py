"""Going back: checkpoints that a run has saved after a step are put aside, and the next start goes on from there."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

from pipeline.config.exitcodes import FINISHED, REQUEUE
from pipeline.core.errors import CheckpointError
from pipeline.engine.checkpoint import CHECKPOINTS, PREFIX, THIN, read_manifest, verify_file
from pipeline.record.files import Lines
from pipeline.record.lock import RunLock
from pipeline.record.notes import FILE as NOTES
from pipeline.record.state import State, read_state, write_state
from pipeline.run.attempt import in_folder


def rewind(run: str, step: int) -> int:
    """Move the checkpoints after ``step`` into ``checkpoints/aside-TIME/``; nothing is deleted.

    Raises:
        CheckpointError: there is none of that step, or it is not whole.
        LaunchError: somebody is at work in the folder, or it cannot be written.
    """
    folder = Path(run)
    lock = RunLock(folder)
    with ExitStack() as stack:
        stack.callback(lock.release)
        in_folder(folder, lock.take)
        checkpoints = folder / CHECKPOINTS
        names = {p.name.removeprefix(PREFIX): p for p in checkpoints.glob(PREFIX + "*")}
        steps = {int(name): path for name, path in names.items() if name.isdigit()}
        if step not in steps:
            known = ", ".join(map(str, sorted(steps))) or "none"
            raise CheckpointError(f"{checkpoints} has no checkpoint of step {step}; there are: {known}")
        saved = read_manifest(steps[step])
        if saved.state.get(THIN):
            raise CheckpointError(
                f"{saved.folder} is kept for evaluation and holds no optimizer's state to go on with "
                "(run.keep_optimizer = true keeps it); start a new run from its weights: start.from"
            )
        for name, facts in saved.files.items():
            verify_file(saved.folder / name, facts)
        later = [path for at, path in steps.items() if at > step]
        in_folder(folder, lambda: _put_aside(folder, step, later))
    print(f"{run} goes on from step {step}; {len(later)} later checkpoints are put aside")
    return FINISHED


def _put_aside(folder: Path, step: int, later: list[Path]) -> None:
    now = datetime.now(UTC)
    aside = folder / CHECKPOINTS / f"aside-{now.strftime('%Y%m%dT%H%M%S')}"
    for path in later:
        aside.mkdir(exist_ok=True)
        os.rename(path, aside / path.name)
    state = read_state(folder)
    write_state(folder, State("requeue", REQUEUE, step, state.attempt if state else 0))
    with closing(Lines(folder / NOTES)) as notes:
        text = f"went back to step {step}" + (f"; later checkpoints are in {aside}" if later else "")
        attempt = state.attempt if state else 0
        notes.append({"time": now.isoformat(timespec="seconds"), "attempt": attempt, "text": text})
