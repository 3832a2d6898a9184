"""``sluice status``: where runs are, in SLURM and by their own word, from small files and without a framework."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from launch import history, slurm
from launch.history import Attempt, Submitted
from pipeline.config import provenance
from pipeline.config.exitcodes import CONFIG, NONFINITE
from pipeline.core.errors import LaunchError
from pipeline.record import lock, logs, metrics
from pipeline.record.beats import Beat, read_beats
from pipeline.record.files import tail
from pipeline.record.formats import duration, short
from pipeline.record.paces import Paces, as_text, read_paces
from pipeline.record.process import boot, born
from pipeline.record.state import FILE as STATE
from pipeline.record.state import State, read_state

SILENT_SECONDS = 120.0
"""A run on another machine that has said nothing for so long, and for 10 of its steps, is not called running."""
CLOCKS = 3600.0
"""Seconds that the clocks of two machines may differ; within them, a silent run is looked at for some seconds."""
ERRORS_SHOWN = 4
RANKS_SHOWN = 8
DEPTH = 12
"""Folders below runs/ in which runs are looked for."""
ROOT = Path("runs")
WATCH_SECONDS = 2.0
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a file raises that holds something else than it should."""
_MEANING = {CONFIG: "something to mend", NONFINITE: "not finite", 1: "a crash"}


@dataclass(frozen=True)
class Status:
    """What is known of a run."""

    run: Path
    phase: str
    """"queued", "running", "saved", "finished", "failed", "died" or "not started"."""
    detail: str
    """More on it, in words; may be empty."""
    job: str | None = None
    """Number of its job in SLURM, while that is queued or running."""
    line: dict[str, Any] = field(default_factory=dict[str, Any])
    """The last line of its metrics."""
    total_steps: int | None = None
    checkpoint: tuple[int, float] | None = None
    """Step and age in seconds of the newest."""
    behind: str = ""
    paces: Paces | None = None
    """Of its ranks; of a run alone, and at work."""
    stopped: str = ""
    """Why its job was not started again."""
    errors: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    """Last error of each rank: text to ranks."""

    @property
    def left(self) -> float | None:
        """Seconds to its end at its last speed."""
        if self.phase != "running" or not self.line or self.total_steps is None:
            return None
        return (self.total_steps - self.line["step"]) * self.line["step_seconds"]


def find_runs(root: Path) -> list[Path]:
    """The run folders below ``root``, links to such included; what cannot be looked into is said on stderr."""
    return sorted(_runs_in(root, (), 0)) if root.is_dir() else []


def _runs_in(folder: Path, above: tuple[str, ...], depth: int) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above or depth > DEPTH:  # a link to where it is in
        return
    try:
        if is_run(folder):
            yield folder
            return
        entries = list(os.scandir(folder))
    except OSError as error:
        print(f"sluice: passed over {folder}: {error.strerror}", file=sys.stderr)
        return
    for entry in entries:
        with suppress(OSError):
            if entry.is_dir():
                yield from _runs_in(Path(entry.path), (*above, real), depth + 1)


def is_run(folder: Path) -> bool:
    """Whether a run has begun there, or was submitted.

    Raises:
        PermissionError: it cannot be looked into.
    """
    return (folder / STATE).is_file() or (folder / history.FOLDER / history.FILE).is_file()


def check_run(folder: Path) -> None:
    """Be sure that it is one.

    Raises:
        LaunchError: it is not.
    """
    try:
        found = is_run(folder)
    except OSError as error:
        raise LaunchError(f"cannot look into {folder}: {error.strerror}") from error
    if not found:
        raise LaunchError(
            f"{folder} is no run folder, nor are there any in it: neither {STATE} nor a submitted job is there"
        )


def read_status(runs: Sequence[Path]) -> list[Status]:
    """Of each run; the errors of its ranks, which stand in many files, only of a run alone.

    Of several, one that cannot be read is told as such, and SLURM's silence on stderr; the others do not suffer.

    Raises:
        LaunchError: a run alone that cannot be read, or of which SLURM does not tell.
    """
    alone = len(runs) == 1
    scene = _scene(runs, alone)
    found: list[Status] = []
    for run in runs:
        try:
            found.append(_status(run, scene, alone))
        except UNREADABLE as error:
            if alone:
                raise LaunchError(f"cannot read what {run} says of itself: {error}") from error
            found.append(Status(run, "unreadable", str(error)))
    return found


def phases(runs: Sequence[Path]) -> dict[Path, tuple[str, str]]:
    """Phase and detail of each run, as :class:`Status` has them, from as few files as say so."""
    scene = _scene(runs, alone=False)
    found: dict[Path, tuple[str, str]] = {}
    for run in runs:
        try:
            state = read_state(run)
            beats = read_beats(run) if state is not None and state.outcome == "running" else []
            found[run] = _phase(run, state, beats, scene)
        except UNREADABLE as error:
            found[run] = ("unreadable", str(error))
    return found


class _Scene(NamedTuple):
    """What is known of several runs from elsewhere than their own words."""

    histories: dict[Path, list[Submitted | Attempt]]
    jobs: dict[Path, str | None]
    """The last one submitted of each."""
    queue: dict[str, str] | None
    """State of the jobs that SLURM knows as queued or running; None: it does not answer."""
    moving: set[Path]
    """Runs whose holders show that they live."""


def _scene(runs: Sequence[Path], alone: bool) -> _Scene:
    """Look around once for all.

    Raises:
        LaunchError: SLURM does not answer, and only one run is asked about.
    """
    histories = {run: _history(run) for run in runs}
    last = {run: history.last_submitted(entries, run) for run, entries in histories.items()}
    jobs = {entry.job: entry.name for entry in last.values() if entry is not None}
    queue: dict[str, str] | None = {}
    try:
        queue = slurm.states(jobs) if jobs and shutil.which("squeue") else {}
    except LaunchError as error:
        if alone:
            raise
        print(f"sluice: {error}; what is queued is not known", file=sys.stderr)
        queue = None
    moving = lock.moving([run for run in runs if _doubtful(run)])
    return _Scene(histories, {run: entry.job if entry else None for run, entry in last.items()}, queue, moving)


def _history(run: Path) -> list[Submitted | Attempt]:
    try:
        return history.read(run)
    except (OSError, ValueError):
        return []


def _doubtful(run: Path) -> bool:
    """Whether a run on another machine seems to be silent only by this machine's clock, or to speak only by that."""
    state = read_state(run)
    if state is None or state.outcome != "running":
        return False
    ages = [time.time() - max(b.time, b.alive or 0) for b in _elsewhere(read_beats(run), state)]
    return bool(ages) and (min(ages) < -CLOCKS / 10 or SILENT_SECONDS < min(ages) < CLOCKS)


def _status(run: Path, scene: _Scene, alone: bool) -> Status:
    state, beats = read_state(run), read_beats(run)
    entries, job = scene.histories[run], scene.jobs[run]
    line = metrics.read_last(run)
    phase, detail = _phase(run, state, beats, scene)
    again = sum(isinstance(e, Attempt) and e.job == job and e.decision == "requeue" for e in entries)
    if again:
        detail = "; ".join(filter(None, [detail, f"requeued {again} {'time' if again == 1 else 'times'}"]))
    plan = provenance.read(run).get("plan", {})
    errors: dict[str, list[int]] = {}
    if phase != "finished" and alone:
        for rank in logs.log_ranks(run):
            if (text := logs.last_error(run, rank)) is not None:
                errors.setdefault(text, []).append(rank)
    if state is not None and state.outcome == "failed" and state.error and not errors:
        errors[state.error] = []
    return Status(
        run,
        phase,
        detail,
        job=job if scene.queue and job in scene.queue else None,
        line=line,
        total_steps=plan.get("total_steps"),
        checkpoint=newest_checkpoint(run),
        behind=rank_behind(beats) if phase == "running" else "",
        paces=read_paces(run, beats[0].attempt) if phase == "running" and alone and beats else None,
        stopped=_stopped(run, phase, entries, job),
        errors=errors,
    )


def _stopped(run: Path, phase: str, entries: Sequence[Submitted | Attempt], job: str | None) -> str:
    """What the job's agent has decided in the end; where it has said nothing, what the job itself said last."""
    if phase not in ("saved", "failed", "died", "not started") or job is None:
        return ""
    last = entries[-1]
    if isinstance(last, Attempt):
        return last.reason if last.decision == "stop" else ""
    log = run / history.FOLDER / f"slurm-{job}.out"
    said = [line for line in tail(log).decode(errors="replace").splitlines() if line.strip()]
    return f"{log} ends with: {said[-1]}" if said else ""


def _phase(run: Path, state: State | None, beats: list[Beat], scene: _Scene) -> tuple[str, str]:
    job = scene.jobs[run]
    queued = (scene.queue or {}).get(job or "")
    if queued is not None:
        where = f"SLURM job {job} is {queued.lower()}"
        running = queued in ("RUNNING", "COMPLETING", "STOPPED", "SUSPENDED")
        return ("running" if running else "queued"), where
    if state is None:
        entries = scene.histories[run]
        if entries and isinstance(last := entries[-1], Attempt) and last.decision in ("finished", "stop"):
            done = last.decision == "finished"  # no run, which says so itself
            return ("finished", "") if done else ("failed", f"exit code {last.exit_code}")
        gone = "is gone from the queue" if scene.queue is not None else "may be queued or running"
        return "not started", f"SLURM job {job} {gone}" if job else ""
    if state.outcome != "running":
        return _ended(state)
    if not lock.copied(run / lock.FILE) and (run in scene.moving or alive(beats, state)):
        return "running", ""
    return "died", "without a word; `sluice resume` goes on"


def _ended(state: State) -> tuple[str, str]:
    if state.outcome == "finished":
        return "finished", ""
    if state.outcome == "requeue":
        return "saved", f"at step {state.step} (exit code {state.exit_code}); `sluice resume` goes on"
    code = state.exit_code
    return "failed", f"exit code {code}, {_MEANING.get(code or 0, 'unknown')}"


def alive(beats: Sequence[Beat], state: State) -> bool:
    """Whether some rank still lives: by its process on this machine, by what it said lately on others."""
    spoken = _elsewhere(beats, state)
    own = [b for b in beats if b.attempt == state.attempt and b not in spoken]
    if any(born(b.pid) is not None and born(b.pid) == (b.born or born(b.pid)) for b in own):
        return True
    if not own and not spoken:  # it has only begun
        return time.time() - datetime.fromisoformat(state.time).timestamp() < SILENT_SECONDS
    return any(-CLOCKS / 10 < time.time() - max(b.time, b.alive or 0) < silence(b) for b in spoken)


def _elsewhere(beats: Sequence[Beat], state: State) -> list[Beat]:
    """The beats of this attempt's ranks on other machines."""
    here = socket.gethostname()
    return [b for b in beats if b.attempt == state.attempt and (b.host != here or b.boot not in ("", boot()))]


def silence(beat: Beat) -> float:
    """Seconds without a word after which a rank on another machine is not believed to live."""
    return max(SILENT_SECONDS, 10 * (beat.step_seconds or 0.0))


def rank_behind(beats: Sequence[Beat]) -> str:
    """Those that the others wait for: at an earlier step, or still without their batch. Empty if all are level."""
    order = {b.rank: (b.step, b.phase != "data") for b in beats}
    if not order or min(order.values()) == max(order.values()):
        return ""
    late = [b for b in beats if order[b.rank] == min(order.values())]
    if 2 * len(late) > len(beats):
        return ""
    first = max(late, key=lambda b: time.time() - b.time)
    more = f" (and {len(late) - 1} more)" if len(late) > 1 else ""
    since = duration(max(0.0, time.time() - first.time))
    front = max(b.step for b in beats)
    return f"rank {first.rank} on {first.host}{more}: in {first.phase!r} of step {first.step} of {front} for {since}"


def newest_checkpoint(run: Path) -> tuple[int, float] | None:
    """Step and age in seconds of the newest checkpoint folder, whole or not."""
    folders = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    if not folders:
        return None
    newest = max(folders, key=lambda p: int(p.name[5:]))
    return int(newest.name[5:]), max(0.0, time.time() - newest.stat().st_mtime)


def details(status: Status) -> str:
    """A run in a few lines."""
    line, rows = status.line, dict[str, str]()
    if line:
        total = f" of {status.total_steps:,} ({line['step'] / status.total_steps:.0%})" if status.total_steps else ""
        rows["step"] = f"{line['step']:,}{total}, {line['samples']:,} samples, epoch {line['epoch']:.4g}"
        rows["loss"] = short(line["loss"])
        left = f", {duration(status.left)} left" if status.left is not None else ""
        speed = f"{short(line['samples_per_second'], 3)} images/s"
        rows["speed"] = f"{speed}, data wait {line['data_wait']:.0%}{left}"
    if status.checkpoint:
        rows["checkpoint"] = f"step {status.checkpoint[0]:,}, {duration(status.checkpoint[1])} old"
    if status.behind:
        rows["behind"] = status.behind
    if status.stopped:
        rows["stopped"] = status.stopped
    for index, (text, ranks) in enumerate(status.errors.items()):
        if index == ERRORS_SHOWN:
            rows["errors"] = f"{len(status.errors) - index} other ones; see `sluice logs`"
            break
        rows["error" + " " * index] = f"{_ranks(ranks)}: {text}" if ranks else text
    head = f"{status.run}: {status.phase}" + (f", {status.detail}" if status.detail else "")
    lines = [head, *(f"  {name.strip():<12}{text}" for name, text in rows.items())]
    ranks = as_text(status.paces, RANKS_SHOWN) if status.paces and len(status.paces.nodes) > 1 else []
    return "\n".join([*lines, *(f"  {line}" for line in ranks)])


def _ranks(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:4]))
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}" + (f" and {len(ranks) - 4} more" if ranks[4:] else "")


def table(found: Sequence[Status]) -> str:
    """Many runs, a line each."""
    rows = [["run", "state", "step", "loss", "images/s", "left", ""]]
    for s in found:
        step = f"{s.line['step']:,}" + (f"/{s.total_steps:,}" if s.total_steps else "") if s.line else "-"
        values = [short(s.line["loss"]), short(s.line["samples_per_second"], 3)] if s.line else ["-", "-"]
        left = duration(s.left) if s.left is not None else "-"
        rows.append([str(s.run), s.phase, step, *values, left, s.detail])
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[6]]).rstrip() for row in rows
    )


def text_of(runs: Sequence[Path]) -> str:
    """What `sluice status` prints."""
    found = read_status(runs)
    return details(found[0]) if len(found) == 1 else table(found)


def show(runs: Sequence[Path], watch: bool) -> None:
    """Print the status of ``runs``, or of all below these folders or runs/; again and again if ``watch``.

    Raises:
        LaunchError: one of them is no run and holds none, or see :func:`read_status`.
    """
    for folder in runs:
        if not find_runs(folder):
            check_run(folder)
    below = list(runs) or [ROOT]
    while True:
        chosen = [run for folder in below for run in find_runs(folder)]
        text = text_of(chosen) if chosen else f"no runs in {', '.join(map(str, below))}"
        if not watch:
            print(text)
            return
        clear = "\x1b[H\x1b[J" if sys.stdout.isatty() else ""
        print(f"{clear}{datetime.now().strftime('%H:%M:%S')}\n{text}", flush=True)
        time.sleep(WATCH_SECONDS)
