"""A SLURM array whose tasks have each an agent and a ``job.json`` of their own, found by the number of the task.

So each is saved, queued again, started again and left alone as if it had been submitted alone; ``sluice status``,
``cancel`` and ``resume`` know it, by the folder that it keeps its notes in, as "ARRAY_TASK".
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from launch import history, slurm, submit
from launch.job import TASK
from launch.profile import Profile
from launch.submit import COPY, SCRIPTS, Draft, Request


@dataclass(frozen=True)
class Task:
    """What a task of an array does."""

    name: str
    """For people."""
    folder: Path
    """Whose ``launch/`` holds its notes."""
    request: Request
    """What submits it alone."""
    draft: Draft
    file: str = ""
    """Name that the copy of its configuration must have; empty: any."""


def queue(tasks: Sequence[Task], options: Sequence[str], notes: Path, profile: Profile, cluster: str) -> str:
    """Write down what each task is to do, put the array into the queue, and note it in every folder. Its number.

    Args:
        tasks: of one kind.
        options: of sbatch.
        notes: folder for what the array is told and logs.
        profile: of the cluster.
        cluster: its name.

    Raises:
        LaunchError: SLURM refuses.
    """
    notes.mkdir(parents=True, exist_ok=True)
    stem = f"job-{_next(notes):03d}"
    places: list[Path] = []
    for number, task in enumerate(tasks):
        places.append(_copy(task))
        arguments = [str(places[-1]) if word == COPY else word for word in task.draft.job.arguments]
        replace(task.draft.job, arguments=arguments).write(notes / f"{stem}-{number}.json")
    environment = submit.submission_environment(profile, notes.absolute() / f"{stem}-{TASK}.json")
    array = slurm.submit(options, SCRIPTS / f"{tasks[0].draft.job.kind}.sbatch", environment)
    (name,) = (option.partition("=")[2] for option in options if option.startswith("--job-name="))
    for number, (task, config) in enumerate(zip(tasks, places, strict=True)):
        asked = replace(task.request, config=config, overrides=())
        entry = history.Submitted(
            time=history.now(),
            job=f"{array}_{number}",
            cluster=cluster,
            nodes=asked.nodes,
            time_limit=asked.time or profile.time,
            config=str(config),
            command=submit.command_of(asked),
            name=name,
            run=os.path.realpath(task.folder),
        )
        history.append(task.folder, entry)
        log = task.folder / history.FOLDER / f"slurm-{array}_{number}.out"
        with suppress(OSError):  # a file system without links: the log is where the array's lie
            log.symlink_to(os.path.relpath(notes / f"slurm-{array}-{number}.out", log.parent))
    return array


def _copy(task: Task) -> Path:
    """Where the resolved configuration of a task now lies."""
    own = (task.folder / history.FOLDER).absolute()
    own.mkdir(parents=True, exist_ok=True)
    path = own / f"config-{_next(own, 'config'):03d}.toml"
    if task.file:
        path = path.with_suffix("") / task.file
        path.parent.mkdir()
    path.write_text(task.draft.config, encoding="utf-8")
    return path


def _next(folder: Path, stem: str = "job") -> int:
    """The number of the next file of a name."""
    taken = [int(part) for path in folder.glob(f"{stem}-*") if (part := path.name.split("-")[1][:3]).isdigit()]
    return max(taken, default=0) + 1
