"""Runs that are there already: their logs, stopping them, and going on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from launch import history, slurm
from launch.history import Submitted
from launch.status import check_run, read_status
from launch.supervise import STATE, STOP, clear_stop
from pipeline.config import provenance
from pipeline.core.errors import LaunchError
from pipeline.core.files import replace_file
from pipeline.record import logs
from pipeline.record.lock import refuse_second

STARTED = "launch/started.json"
"""In the run folder: the command that started it here, and where."""
FOLLOW_SECONDS = 0.2
_ACTIVE = ("queued", "running")


def read_log(run: Path, rank: int, follow: bool) -> Iterator[bytes]:
    """A rank's log from its last attempt on; without end if ``follow``.

    Raises:
        LaunchError: no such run, or no such rank in it.
    """
    check_run(run)
    path = logs.log_path(run, rank)
    if not path.is_file():
        known = logs.log_ranks(run)
        have = f"ranks 0 to {known[-1]} have one" if known else "no rank has written any yet"
        raise LaunchError(f"rank {rank} of {run} has no log; {have}")
    with open(path, "rb") as file:
        text = file.read()
        begin = text.rfind(b"\n" + logs.HEADER.encode())
        yield text[begin + 1 :]
        while follow:
            time.sleep(FOLLOW_SECONDS)
            yield file.read()


def cancel(run: Path) -> str:
    """Ask a run to save and end. Returns what was done.

    SLURM itself kills a job that is cancelled after its KillWait, which is too short for a large model; so a job that
    trains is asked first, and only cancelled when this is asked for a second time.

    Raises:
        LaunchError: it is not queued or running, or SLURM refuses.
    """
    check_run(run)
    status = read_status([run])[0]
    if status.phase not in _ACTIVE:
        raise LaunchError(f"{run} is neither queued nor running: {status.phase}")
    if status.job is not None:
        if status.phase == "running" and (run / STATE).is_file() and not history.asked_to_end(run, status.job):
            history.ask_to_end(run, status.job)
            return f"SLURM job {status.job} is asked to save and end; ask again to have SLURM end it at once"
        slurm.call("scancel", status.job)
        return f"SLURM job {status.job} is cancelled"
    (run / STOP).touch()
    return f"{run} is asked to stop; it saves first (watch it with `sluice status {run}`)"


def note_start(run: Path, arguments: Sequence[str]) -> None:
    """Keep the command that starts a run here, for :func:`resume`.

    Raises:
        LaunchError: the run folder cannot be written, or a run is at work in it.
    """
    text = json.dumps({"time": history.now(), "folder": os.getcwd(), "arguments": list(arguments)}, indent=1)
    refuse_second(run)  # of a run at work, neither a request to stop nor the command that began it is ours to replace
    clear_stop(run)
    (run / STARTED).parent.mkdir(exist_ok=True)
    replace_file(run / STARTED, text.encode() + b"\n")


def resume_command(run: Path) -> tuple[str, list[str]]:
    """Working folder and arguments of the `sluice` command that goes on with a run: the one that began it.

    Raises:
        LaunchError: the run is at work or has finished, or nobody has noted how it was started.
    """
    check_run(run)
    status = read_status([run])[0]
    if status.phase in (*_ACTIVE, "finished"):
        raise LaunchError(f"{run} is {status.phase}{', ' + status.detail if status.detail else ''}: nothing to resume")
    submitted = [e for e in history.read(run) if isinstance(e, Submitted)]
    try:
        started = json.loads((run / STARTED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        started = None
    if submitted and (started is None or submitted[-1].time >= started["time"]):
        return provenance.read(run).get("folder", os.getcwd()), list(submitted[-1].command)
    if started is None:
        raise LaunchError(f"nobody noted how {run} was started; give the same `sluice train` or `submit` again")
    return started["folder"], started["arguments"]


def resume(run: Path) -> NoReturn:
    """Become the command that goes on with a run.

    Raises:
        LaunchError: see :func:`resume_command`; or its working folder is gone.
    """
    folder, arguments = resume_command(run)
    print(f"in {folder}: sluice {' '.join(arguments)}", flush=True)
    try:
        os.chdir(folder)
    except OSError as error:
        raise LaunchError(f"cannot enter {folder}, where {run} was started: {error.strerror}") from error
    os.execv(sys.executable, [sys.executable, "-m", "launch", *arguments])


def board(run: Path, port: int) -> NoReturn:
    """Become TensorBoard on a run's curves, for this machine alone.

    Raises:
        LaunchError: no such run.
    """
    check_run(run)
    # The loopback is TensorBoard's own default; said here so that nothing in its environment changes that.
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", f"--port={port}"]
    os.execv(sys.executable, [*command, f"--logdir={run / 'tensorboard'}"])
