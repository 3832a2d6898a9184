"""``sluice submit SUITE SUBJECT...``: a suite as a SLURM array, a task for each subject.

A subject and not an evaluation, since what costs is the subject: it is opened once, and its features are extracted once
for all evaluations that look at them, while those of two subjects have nothing in common. Averages need what all
evaluations of a subject have given, too. A subject is one kind of weights of one checkpoint; a run stands for the
checkpoint that is its newest when the task starts.

Nothing is merged afterwards: each evaluation writes a record of its own. A task that is started again does what is
not there.
"""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from launch import history, status, submit
from launch.profile import Profile
from launch.profile import load as load_profile
from launch.submit import COPY, SCRIPTS, Draft, Request
from launch.sweep import claimed
from launch.tasks import Task, queue
from pipeline.config import load
from pipeline.config.schema import SuiteConfig, Weights
from pipeline.core.errors import ConfigError, LaunchError
from pipeline.record.records import slug
from pipeline.suites.on_disk import exported, steps_of
from pipeline.suites.subjects import Spec, find


@dataclass(frozen=True)
class Order:
    """What is asked for on the command line."""

    suite: Path
    subjects: Sequence[str]
    overrides: Sequence[str] = ()
    weights: Sequence[Weights] = ()
    """Of checkpoints; none: as the suite has it."""
    out: Path | None = None
    """Folder for the results; None: each run's."""
    procs: int = 1
    """Ranks of a task, on one node."""
    cluster: str | None = None
    time: str | None = None
    """Of a task."""
    after: str | None = None
    at_once: int | None = None
    """Tasks that may be at work at the same time; None: as many as there is room for."""


class Subject(NamedTuple):
    """What a task evaluates."""

    spelled: str
    """For the task: whole paths, and one thing."""
    called: str
    """For people."""
    folder: Path
    """For its results."""
    words: Sequence[str] = ()
    """Options that choose its weights and its name."""


def submit_suite(order: Order, *, dry_run: bool) -> str:
    """Check, and submit what is not queued already, as one array. Returns what there is to say.

    Raises:
        ConfigError: the suite, a subject or the profile is wrong.
        LaunchError: SLURM refuses, or another command is submitting the same.
    """
    cluster, profile = load_profile(order.cluster)
    config = load.load_suite(order.suite, order.overrides)
    profile = _share(profile, order.procs)
    tasks = [_task(order, config, profile, subject) for subject in _subjects(order, config)]
    said = [f"{order.suite}: keys, types and values are sound"]
    for task in tasks:
        submit.writable(task.folder)
    phases = status.phases([task.folder for task in tasks if status.is_run(task.folder)])
    active = [task for task in tasks if phases.get(task.folder, ("",))[0] in ("queued", "running")]
    if active:
        said += [f"passed over, queued or running: {', '.join(task.name for task in active)}"]
    tasks = [task for task in tasks if task not in active]
    if not tasks:
        return "\n".join([*said, "nothing to submit"])
    notes = tasks[0].folder.parent
    limit = f"%{order.at_once}" if order.at_once else ""
    options = _options(order, tasks, profile, notes, limit)
    if dry_run:
        listed = [f"  task {number}: {task.name}" for number, task in enumerate(tasks)]
        command = shlex.join(["sbatch", "--parsable", *options, str(SCRIPTS / "evaluate.sbatch")])
        left = f"left for the submission: sluice {shlex.join(tasks[0].draft.check)}, in the job's own environment"
        return "\n".join([*said, *listed, left, f"$ {command}"])
    submit.check_there(tasks[0].draft, profile)
    number = _queued(tasks, options, notes, profile, cluster)
    results = dict.fromkeys(str(task.folder.parents[2]) for task in tasks)
    watched = dict.fromkeys(str(task.folder.parent) for task in tasks)
    return "\n".join(
        [
            *said,
            f"job {number}: {len(tasks)} subjects; logs: {notes}/slurm-{number}-TASK.out",
            f"how far they are: sluice status {shlex.join(watched)}",
            f"the table, also of what is there so far: sluice report {shlex.join(results)}",
        ]
    )


def submit_after(order: Order, runs: Sequence[Path], array: str) -> str:
    """Submit the suite for runs of an array, each when the task of the same number has ended well. Its number."""
    cluster, profile = load_profile(order.cluster)
    waits = (f"--dependency=aftercorr:{array}", "--kill-on-invalid-dep=yes")
    profile = _share(profile, order.procs).model_copy(update={"sbatch": (*profile.sbatch, *waits)})
    config = load.load_suite(order.suite)
    subjects = [_newest(run, config.weights, order, run.name) for run in runs]
    tasks = [_task(order, config, profile, subject) for subject in subjects]
    notes = tasks[0].folder.parent
    return _queued(tasks, _options(order, tasks, profile, notes), notes, profile, cluster)


def _queued(tasks: Sequence[Task], options: Sequence[str], notes: Path, profile: Profile, cluster: str) -> str:
    with claimed(notes) as own:
        if not own:
            raise LaunchError(f"another command is submitting what lies in {notes}; wait for it")
        return queue(tasks, options, notes, profile, cluster)


def _options(order: Order, tasks: Sequence[Task], profile: Profile, notes: Path, limit: str = "") -> list[str]:
    """Of sbatch, for all tasks."""
    whole = replace(tasks[0].request, array=f"0-{len(tasks) - 1}{limit}", after=order.after)
    return submit.sbatch_options(whole, profile, replace(tasks[0].draft.job, run=str(notes)), notes)


def _share(profile: Profile, procs: int) -> Profile:
    """Of a node as much as so many of its ranks have.

    Raises:
        ConfigError: it has not so many.
    """
    if procs > profile.ranks:
        raise ConfigError(f"--procs {procs}: a node of this cluster has {profile.ranks} (ranks_per_node)")
    if profile.exclusive:
        return profile
    part = procs / profile.ranks
    memory = profile.memory_gb * part if profile.memory_gb else None
    return profile.model_copy(
        update={"gpus_per_node": math.ceil(profile.gpus_per_node * part), "memory_gb": memory, "ranks_per_node": procs}
    )


def _subjects(order: Order, config: SuiteConfig) -> list[Subject]:
    """What is evaluated, each thing once.

    Raises:
        ConfigError: something is nothing that could be evaluated, or has no folder for its results.
    """
    if not order.subjects:
        raise ConfigError(
            f"say what is evaluated: sluice submit {order.suite} RUN... (or checkpoints, exports, weights)"
        )
    coming = [word for word in order.subjects if order.after is not None and _to_come(word)]
    words = [word for word in order.subjects if word not in coming]
    kinds = list(order.weights) or [config.weights]
    specs = find(words, kinds) if words else []
    found = [_newest(Path(word), kind, order, word) for word in coming for kind in kinds]
    return list(dict.fromkeys([*found, *(_of_spec(spec, order) for spec in specs)]))


def _to_come(word: str) -> bool:
    """Whether it is the folder of a run that has no checkpoint yet."""
    return Path(word).is_dir() and exported(Path(word)) is None and not steps_of(Path(word))


def _newest(run: Path, kind: Weights, order: Order, source: str) -> Subject:
    """A run's newest checkpoint of the moment when its task starts."""
    called = f"{source}: newest{'' if kind == 'model' else f', {kind}'}"
    words = ("--weights", str(kind), *_apart(order, source))
    return Subject(str(run.absolute()), called, (order.out or run).absolute(), words)


def _of_spec(spec: Spec, order: Order) -> Subject:
    """Spelled so that a task, whenever it starts, means that and nothing else."""
    if spec.newest and spec.run is not None:
        return _newest(spec.run, spec.weights, order, spec.source)
    place = "" if spec.path is None else str(spec.path.absolute())
    spelled = {
        "untrained": f"random:{place}",
        "random": f"random:{spec.model}",
        "timm": f"timm:{spec.model}={place}",
        "open_clip": f"open_clip:{spec.model}={place}" if spec.model else f"open_clip:{place}",
    }.get(spec.kind, place)
    folder = order.out or spec.run
    if folder is None:
        raise ConfigError(f"{spec.spelled} is not of a run: say where its results go, --out FOLDER")
    weights = ("--weights", str(spec.weights)) if spec.kind == "checkpoint" else ()
    return Subject(spelled, spec.name, folder.absolute(), (*weights, *_apart(order, spec.source)))


def _apart(order: Order, source: str) -> tuple[str, ...]:
    """Options for results that do not lie with the run; ``source`` tells it from the others there."""
    return () if order.out is None else ("--out", str(order.out.absolute()), "--source", source)


def _task(order: Order, config: SuiteConfig, profile: Profile, subject: Subject) -> Task:
    text = load.dump(config)
    mark = hashlib.sha256(repr((subject.spelled, subject.words, text)).encode()).hexdigest()[:12]
    folder = notes_of(subject.folder, order.suite) / f"{slug(subject.called)}-{mark}"
    arguments = ["-m", submit.PROGRAM, "eval", "--run", subject.spelled, "--suite", COPY, *subject.words]
    words = (subject.spelled, *subject.words[:4], "--procs", str(order.procs))
    request = Request(order.suite, (), 1, order.cluster, order.time, words=words)
    job = replace(submit.job_of("evaluate", str(folder), arguments, request, profile), ranks_per_node=order.procs)
    overrides = [word for override in order.overrides for word in ("--set", override)]
    draft = Draft(job, text, [], ["check", str(order.suite), *overrides])
    return Task(subject.called, folder, request, draft, f"{order.suite.stem}.toml")


def notes_of(folder: Path, suite: Path) -> Path:
    """Where what is launched of a suite keeps its notes, a folder for each subject.

    Args:
        folder: of the results.
        suite: its file.
    """
    return folder / history.FOLDER / f"eval-{suite.stem}"
