"""A sweep as a SLURM array: one task for each run, each with an agent of its own, as if it had been submitted alone.

A task is told what to do by a ``job.json`` of its own, which the script finds by the number of the task. So each run is
saved, queued again, started again and left alone as any other; ``sluice status``, ``cancel`` and ``resume`` know it by
its task. Where a suite is asked for, a second array follows: each of its tasks waits for the run of the same number.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from launch import history, status, submit
from launch.evaluations import Order, submit_after
from launch.profile import Profile
from launch.profile import load as load_profile
from launch.submit import SCRIPTS, Request
from launch.sweep import Asked, claimed, examined
from launch.tasks import Task, queue
from launch.variants import folder_of, standing
from pipeline.config.mistakes import Mistakes
from pipeline.config.sweep import Plan, Variant, told
from pipeline.core.errors import LaunchError, SluiceError


class Shape(NamedTuple):
    """What is asked for of SLURM."""

    nodes: int
    """Of each run."""
    cluster: str | None = None
    time: str | None = None
    """Of each run."""
    at_once: int | None = None
    """Runs that may train at the same time; None: as many as there is room for."""


def submit_sweep(asked: Asked, shape: Shape, *, dry_run: bool) -> str:
    """Check all runs, and submit those that are to be done, as one array. Returns what there is to say.

    Raises:
        ConfigError: with every mistake of every run; or the profile is wrong.
        LaunchError: SLURM refuses, or another command is submitting the same sweep.
    """
    plan = examined(asked)
    name, profile = load_profile(shape.cluster)
    todo, said = _to_do(plan, asked.retry)
    if not todo:
        return "\n".join([*said, "nothing to submit"])
    tasks = [_task(asked, shape, profile, variant) for variant in todo]
    said += _checked(asked, tasks)
    limit = f"%{shape.at_once}" if shape.at_once else ""
    whole = replace(tasks[0].request, config=asked.config, array=f"0-{len(tasks) - 1}{limit}")
    job = replace(tasks[0].draft.job, run=os.path.abspath(plan.folder))
    notes = plan.folder / history.FOLDER
    options = submit.sbatch_options(whole, profile, job, notes.absolute())
    if dry_run:
        listed = [f"  task {number}: {task.name}" for number, task in enumerate(tasks)]
        command = shlex.join(["sbatch", "--parsable", *options, str(SCRIPTS / "pretrain.sbatch")])
        return "\n".join([*said, *listed, f"$ {command}"])
    submit.check_there(replace(tasks[0].draft, check=_check_words(asked, shape.nodes * profile.ranks)), profile)
    with claimed(plan.folder) as own:
        if not own:
            raise LaunchError(f"another command is submitting what lies in {plan.folder}; wait for it")
        number = queue(tasks, options, notes, profile, name)
        said += [f"job {number}: {len(tasks)} runs; their logs: {notes}/slurm-{number}-TASK.out"]
        if plan.suite is not None:
            order = Order(Path(plan.suite), [], cluster=shape.cluster, time=shape.time)
            after = submit_after(order, [task.folder for task in tasks], number)
            said += [f"job {after}: {plan.suite}, of each run when it has finished"]
    return "\n".join(said)


def _to_do(plan: Plan, retry: bool) -> tuple[list[Variant], list[str]]:
    """The runs to submit, and a line on those that are passed over."""
    there = [folder_of(v) for v in plan.variants if status.is_run(folder_of(v))]
    phases = status.phases(there) if there else {}
    active = [v for v in plan.variants if phases.get(folder_of(v), ("",))[0] in ("queued", "running")]
    kinds = {
        "finished": [v for v in plan.variants if v not in active and standing(v) == "finished"],
        "failed for good": [v for v in plan.variants if v not in active and standing(v) == "failed" and not retry],
        "queued or running": active,
    }
    passed = {variant.name for kind in kinds.values() for variant in kind}
    said = [f"passed over, {kind}: {', '.join(v.name for v in found)}" for kind, found in kinds.items() if found]
    return [v for v in plan.variants if v.name not in passed], said


def _task(asked: Asked, shape: Shape, profile: Profile, variant: Variant) -> Task:
    request = Request(asked.config, asked.overrides, shape.nodes, shape.cluster, shape.time)
    return Task(variant.name, folder_of(variant), request, submit.pretrain_draft(request, profile, variant.config))


def _checked(asked: Asked, tasks: Sequence[Task]) -> list[str]:
    """What the checks of the first run say.

    Raises:
        Mistakes: with those of all runs.
    """
    problems: dict[str, list[str]] = {}
    lines: dict[str, str] = {}
    for task in tasks:
        place = task.folder
        for title, check in [*task.draft.checks, ("folder", lambda place=place: submit.writable(place.absolute()))]:
            try:
                lines.setdefault(title, check())
            except SluiceError as error:
                problems.setdefault(f"{title}: {error}", []).append(task.name)
    if problems:
        raise Mistakes(str(asked.config), told(problems, len(tasks)))
    return [f"{title}: {line}" for title, line in lines.items() if title != "folder"]


def _check_words(asked: Asked, ranks: int) -> list[str]:
    """Of `sluice`: what checks all runs where their components can be imported."""
    overrides = [word for override in asked.overrides for word in ("--set", override)]
    return ["check", str(asked.config), *overrides, "--procs", str(ranks)]
