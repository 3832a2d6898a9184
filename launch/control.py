"""Runs that are there already: their logs, stopping them, and going on."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from launch import history, slurm
from launch.history import Submitted
from launch.local import child_environment, run_command
from launch.status import check_run, read_status
from launch.supervise import STATE, STOP
from pipeline.config import provenance
from pipeline.core.errors import LaunchError
from pipeline.record import logs

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


def resume_command(run: Path) -> tuple[str, list[str]]:
    """Working folder and arguments of the `sluice` command that goes on with a run.

    It is the command that began it, but of this folder, whatever it was called before, and with the configuration that
    lies in it: a file that was edited meanwhile, or is gone, is not the run's.

    Raises:
        LaunchError: the run is at work or has finished, or nobody has noted how it was started.
    """
    check_run(run)
    status = read_status([run])[0]
    if status.phase in (*_ACTIVE, "finished"):
        raise LaunchError(f"{run} is {status.phase}{', ' + status.detail if status.detail else ''}: nothing to resume")
    facts = provenance.read(run)
    submitted = [e for e in history.read(run) if isinstance(e, Submitted)]
    given: list[str] = facts.get("command", [])
    where: str = facts.get("folder", os.getcwd())
    if submitted and (given[:1] != ["sluice"] or given[1:2] == ["submit"] or submitted[-1].time >= facts["time"]):
        given = ["sluice", *submitted[-1].command]
    if given[:2] not in (["sluice", "train"], ["sluice", "submit"]):
        raise LaunchError(
            f"nobody noted how {run} was started; give the same `sluice train` or `submit` again, with "
            f"{run / provenance.CONFIG_FILE} and --set run.folder={run}"
        )
    own = run.absolute() / provenance.CONFIG_FILE
    if not own.is_file():  # it did not come so far
        return where, given[1:]
    return where, [given[1], str(own), "--set", f"run.folder={json.dumps(_from(where, run))}", *_shape(given[2:])]


def _from(where: str, run: Path) -> str:
    """The path of a run folder as seen from another folder, short where it lies below that one."""
    path = run.absolute()
    return str(path.relative_to(where)) if path.is_relative_to(where) else str(path)


def _shape(words: Sequence[str]) -> list[str]:
    """Of a command's words those that say where and on how much it runs: neither the configuration nor its changes."""
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        valued = word.startswith("--") and "=" not in word
        pair = [word, *([rest.pop(0)] if valued and rest else [])]
        if word.startswith("--") and word.partition("=")[0] not in ("--set", "--after"):
            kept += pair
    return kept


def resume(run: Path, from_step: int | None = None) -> NoReturn:
    """Become the command that goes on with a run.

    Args:
        run: its folder.
        from_step: of the checkpoint to go back to; None: from the newest.

    Raises:
        LaunchError: see :func:`resume_command`; or its working folder is gone, or it cannot go back.
    """
    if from_step is not None:
        _go_back(run, from_step)
    folder, arguments = resume_command(run)
    print(f"in {folder}: sluice {shlex.join(arguments)}", flush=True)
    try:
        os.chdir(folder)
    except OSError as error:
        raise LaunchError(f"cannot enter {folder}, where {run} was started: {error.strerror}") from error
    os.execv(sys.executable, [sys.executable, "-m", "launch", *arguments])


def _go_back(run: Path, step: int) -> None:
    """Put aside what a run has saved after a step."""
    check_run(run)
    if (phase := read_status([run])[0].phase) in _ACTIVE:
        raise LaunchError(f"{run} is {phase}; stop it first (sluice cancel {run})")
    command = run_command(["rewind", "--run", str(run), "--step", str(step)])
    if code := subprocess.run(command, env=child_environment(procs=1)).returncode:
        sys.exit(code)


def board(run: Path, port: int) -> NoReturn:
    """Become TensorBoard on a run's curves, for this machine alone.

    Raises:
        LaunchError: no such run.
    """
    check_run(run)
    # The loopback is TensorBoard's own default; said here so that nothing in its environment changes that.
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", f"--port={port}"]
    os.execv(sys.executable, [*command, f"--logdir={run / 'tensorboard'}"])
