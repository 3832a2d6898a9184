"""``sluice submit``: check all that can be checked before a job waits in a queue, then put it there.

What is submitted is a static script (``slurm/*.sbatch``). It is told where its ``job.json`` lies by an environment
variable; everything else stands in that file and in a copy of the resolved configuration beside it, so that what is
edited meanwhile changes no queued job, and no value ever becomes part of a shell's text.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launch import history, slurm
from launch.decide import Budget
from launch.job import MASTER, NODE, TASK, Job, Kind
from launch.local import child_environment
from launch.profile import HOME, Profile
from launch.profile import load as load_profile
from pipeline.config import load, provenance
from pipeline.config.mistakes import validate
from pipeline.config.resolve import resolve
from pipeline.config.schema import RunConfig, Strict, Text
from pipeline.core import manifest as manifests
from pipeline.core.errors import ConfigError, LaunchError, SluiceError
from pipeline.core.location import is_url

SCRIPTS = HOME / "slurm"
PROGRAM = "pipeline.run"
"""What a rank runs."""
_ARRAY = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*(%[1-9]\d*)?")
_JOB = re.compile(r"\d+(_\d+)?")


class Prepare(Strict):
    """``[prepare]``: shards made by an array of jobs, each from one part of the source."""

    folder: Text
    """Where the tasks keep their notes."""
    arguments: tuple[Text, ...]
    """Of `sluice prep build`; "{task}" is replaced by the number of the task."""


class PrepareConfig(Strict):
    """A file with ``[prepare]``."""

    prepare: Prepare


@dataclass(frozen=True)
class Request:
    """What is asked for on the command line."""

    config: Path
    overrides: Sequence[str] = ()
    nodes: int = 1
    cluster: str | None = None
    time: str | None = None
    array: str | None = None
    after: str | None = None
    words: Sequence[str] = ()
    """What else the command says: of a suite its subjects, and how they are evaluated."""


@dataclass(frozen=True)
class Draft:
    """A job that could be submitted."""

    job: Job
    config: str
    """The resolved configuration."""
    checks: Sequence[tuple[str, Callable[[], str]]]
    """Name, and what says how it stands or raises."""
    check: Sequence[str]
    """Arguments of `sluice` that check the configuration where its components can be imported."""


def submit(request: Request, *, dry_run: bool) -> str:
    """Check, and submit unless it is a dry run. Returns what there is to say.

    Raises:
        ConfigError: the configuration or the profile is wrong, or a check has failed; all that have, at once.
        LaunchError: SLURM refuses, or the run is in the queue already.
    """
    name, profile = load_profile(request.cluster)
    draft = _draft(request, profile)
    run = Path(draft.job.run)
    folder = run.parent if TASK in run.name else run  # of an array's tasks, each has its own in it
    lines = _check(draft, str(request.config), folder, lambda: _not_queued(folder, request))
    number = sum(isinstance(entry, history.Submitted) for entry in history.read(folder)) + 1
    notes = folder / history.FOLDER
    places = {part: notes / f"{part}-{number:03d}{end}" for part, end in (("job", ".json"), ("config", ".toml"))}
    job = replace(draft.job, arguments=[str(places["config"]) if a == COPY else a for a in draft.job.arguments])
    options = sbatch_options(request, profile, job, notes)
    script = SCRIPTS / f"{job.kind}.sbatch"
    if dry_run:
        lines += [f"left for the submission: sluice {shlex.join(draft.check)}, in the job's own environment"]
        return "\n".join([*lines, "", *shown(job, options, script)])
    check_there(draft, profile)
    notes.mkdir(parents=True, exist_ok=True)
    places["config"].write_text(draft.config, encoding="utf-8")
    job.write(places["job"])
    number_of_job = slurm.submit(options, script, submission_environment(profile, places["job"]))
    entry = history.Submitted(
        time=history.now(),
        job=number_of_job,
        cluster=name,
        nodes=request.nodes,
        time_limit=request.time or profile.time,
        config=str(request.config),
        command=command_of(request),
        name=job_name(job),
        run=os.path.realpath(folder),
    )
    history.append(folder, entry)
    lines += [f"job {number_of_job}; its log: {notes}/slurm-{number_of_job}.out"]
    return "\n".join(lines)


COPY = "\0config"
"""In the arguments of a draft: where the copy of the configuration will lie."""


def _draft(request: Request, profile: Profile) -> Draft:
    """What the file asks for: a run or shards."""
    tables = load.read_layers(request.config)
    if any("prepare" in layer.values for layer in tables):
        return _prepare(request, profile)
    if request.array:
        raise ConfigError(f"--array does not belong to {request.config}, see `sluice submit --help`")
    return pretrain_draft(request, profile, load.load_run(request.config, request.overrides))


def pretrain_draft(request: Request, profile: Profile, config: RunConfig) -> Draft:
    """A job that trains."""
    world = request.nodes * profile.ranks
    if profile.launcher == "srun":
        arguments = ["-m", PROGRAM, "train", "--config", COPY]
    else:
        place = ["--procs", str(profile.ranks), "--nodes", str(request.nodes), "--node-rank", NODE]
        arguments = ["-m", "launch", "train", COPY, *place, "--master", MASTER]

    def shards() -> str:
        if config.data.chosen:
            from pipeline.data.dataset import open_data  # numpy is for parts of data sets alone

            data = open_data(config.data)
        else:
            data = manifests.load(config.data.train)
        root = "" if isinstance(data, manifests.Joined) else f"{data.root.rstrip('/')}/"
        missing = [at for s in data.shards if not is_url(at := root + s.name) and not Path(at).is_file()]
        if missing:
            raise ConfigError(f"{len(missing)} of {len(data.shards)} shards are missing, {missing[0]} first")
        plan = resolve(config, data.samples, world, str(request.config))
        return (
            f"{data.samples:,} samples in {len(data.shards):,} shards; a global batch of {plan.global_batch:,} = "
            f"{world} ranks x {plan.micro_batch} x {plan.accumulation}; {plan.total_steps:,} steps"
        )

    def time() -> str:
        limit = request.time or profile.time
        if limit is None:
            return "the partition's limit"
        seconds = slurm.limit_seconds(limit)
        if seconds is not None and seconds < 2 * profile.stop_seconds:
            raise ConfigError(
                f"of a limit of {limit} the last {profile.stop_seconds} s (stop_seconds of the profile) are for "
                "saving, and too little is left to train; give more time, or less to saving"
            )
        return f"{limit}, the last {profile.stop_seconds} s for saving"

    job = job_of("pretrain", config.run.folder, arguments, request, profile)
    told = provenance.command_variable(["sluice", *command_of(request)])
    job = replace(job, environment={**told, **job.environment})
    overrides = [word for override in request.overrides for word in ("--set", override)]
    check = ["check", str(request.config), *overrides, "--procs", str(world)]
    return Draft(job, load.dump(config), [("data", shards), ("time", time)], check)


def _prepare(request: Request, profile: Profile) -> Draft:
    values: dict[str, Any] = {}
    for layer in [*load.read_layers(request.config), load.Layer("--set", load.parse_overrides(request.overrides))]:
        values = load.merge(values, layer.values)
    asked = validate(PrepareConfig, values, str(request.config)).prepare
    if request.nodes != 1:
        raise ConfigError("a task that prepares shards runs on one node; spread them by --array")
    several = any(TASK in argument for argument in asked.arguments)
    if several != (request.array is not None):
        wanted = "needs --array, as its arguments name {task}" if several else f"has no {TASK} for --array to replace"
        raise ConfigError(f"{request.config} {wanted}")
    arguments = ["-m", "launch", "prep", "build", *asked.arguments]
    folder = f"{asked.folder}/task-{TASK}" if several else asked.folder
    job = replace(job_of("prepare", folder, arguments, request, profile), ranks_per_node=1)
    return Draft(job, "", [], ["prep", "build", "--help"])


def job_of(kind: Kind, folder: str, arguments: Sequence[str], request: Request, profile: Profile) -> Job:
    """A job of a kind for a folder, in the cluster's shape."""
    scratch = {"TMPDIR": profile.scratch} if profile.scratch else {}
    return Job(
        kind=kind,
        run=os.path.abspath(folder),
        arguments=arguments,
        nodes=request.nodes,
        ranks_per_node=profile.ranks,
        python=profile.rank_python,
        environment=scratch | profile.environment,
        srun=[*([f"--cpus-per-task={profile.cpus_per_rank}"] if profile.cpus_per_rank else []), *profile.srun],
        interface=profile.interface,
        launcher=profile.launcher,
        stop_seconds=profile.stop_seconds,
        budget=Budget(profile.restarts, profile.requeues),
        leave_out_slow=profile.leave_out_slow,
    )


def _check(draft: Draft, title: str, folder: Path, not_queued: Callable[[], str]) -> list[str]:
    """A line for each check that is passed.

    Raises:
        ConfigError: with all that are not.
    """
    checks = [
        ("configuration", lambda: "keys, types and values are sound"),
        *draft.checks,
        ("folder", lambda: writable(folder)),
        ("queue", not_queued),
    ]
    lines: list[str] = []
    problems: list[str] = []
    for name, check in checks:
        try:
            lines.append(f"{name}: {check()}")
        except SluiceError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ConfigError("\n  ".join([f"{title} is not submitted", *problems]))
    return lines


def writable(folder: Path) -> str:
    """Says that a run's folder can be written.

    Raises:
        LaunchError: it cannot, or SLURM could not write its log there.
    """
    if "\\" in str(folder):
        raise LaunchError(f"{folder} has a backslash, which SLURM does not take in the path of a log; set run.folder")
    there = next(p for p in (folder, *folder.parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise LaunchError(f"{there} cannot be written; set run.folder")
    return f"{folder} can be written"


def _not_queued(folder: Path, request: Request) -> str:
    here = ("", os.path.realpath(folder))
    entries = [e for e in history.read(folder) if isinstance(e, history.Submitted) and e.run in here]
    jobs = {entry.job: entry.name for entry in entries}
    waiting = {job: state for job, state in slurm.states(jobs).items() if job != request.after} if jobs else {}
    if waiting:
        job, state = next(iter(waiting.items()))
        raise LaunchError(
            f"job {job} of this run is {state.lower()}; cancel it (sluice cancel {folder}), or go on after it "
            f"(--after {job})"
        )
    return "no other job of this run"


def check_there(draft: Draft, profile: Profile) -> None:
    """Check what needs the job's own environment: its modules, its Python, its container.

    Raises:
        ConfigError: with what the check has said.
    """
    script = 'set -e; source "$SLUICE_HOME/slurm/environment.sh"; exec "$@"'
    command = ["bash", "-c", script, "bash", *profile.rank_python, "-m", "launch", *draft.check]
    environment = child_environment(1) | submission_environment(profile, Path()) | dict(draft.job.environment)
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().removeprefix("sluice: ")
        raise ConfigError(f"in the job's environment: {said or f'exit code {done.returncode}'}")


def submission_environment(profile: Profile, job: Path) -> dict[str, str]:
    """Of sbatch, and so of the job: this one's, but nothing of a job that this command itself may run in."""
    return slurm.submission(os.environ) | {
        "SLUICE_HOME": str(HOME),
        "SLUICE_PYTHON": profile.host_python,
        "SLUICE_JOB": str(job),
        "SLUICE_MODULES": " ".join(profile.modules),
        "SLUICE_SETUP": profile.setup or "",
    }


def sbatch_options(request: Request, profile: Profile, job: Job, notes: Path) -> list[str]:
    """Of sbatch."""
    if request.array and not _ARRAY.fullmatch(request.array):
        raise ConfigError(f"--array {request.array}: write it like 0-99 or 0-99%8")
    if request.after and not _JOB.fullmatch(request.after):
        raise ConfigError(f"--after {request.after}: the number of a job, as `sluice submit` prints it")
    log = str(notes).replace("%", "%%") + ("/slurm-%A-%a.out" if request.array else "/slurm-%j.out")
    values: Mapping[str, object] = {
        "job-name": job_name(job),
        "chdir": os.getcwd(),
        "output": log,
        "nodes": request.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "cpus-per-task": profile.cpus_per_rank,
        "gpus-per-node": profile.gpus_per_node if job.kind != "prepare" else None,
        "mem": f"{round(profile.memory_gb * 1024)}M" if profile.memory_gb else None,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "time": request.time or profile.time,
        "array": request.array,
        # One that trains goes on however the one before has ended; others need what it was to make.
        "dependency": f"{'afterany' if job.kind == 'pretrain' else 'afterok'}:{request.after}" if request.after else 0,
        "signal": f"B:USR1@{profile.stop_seconds}",
    }
    options = [f"--{name}={value}" for name, value in values.items() if value]
    return [*options, *(["--exclusive"] if profile.exclusive else []), *profile.sbatch]


def job_name(job: Job) -> str:
    """What SLURM calls it."""
    return "sluice-" + re.sub(r"[^\w.-]", "_", Path(job.run).name, flags=re.ASCII)[:60]


def shown(job: Job, options: Sequence[str], script: Path) -> list[str]:
    """What a dry run prints of the job."""
    told = {name: value for name, value in asdict(job).items() if value}
    return [
        f"$ {shlex.join(['sbatch', '--parsable', *options, str(script)])}",
        *(["", f"# {script}", script.read_text(encoding="utf-8").rstrip()]),
        *(["", "# job.json", *(f"{name}: {value}" for name, value in told.items())]),
    ]


def command_of(request: Request) -> list[str]:
    """What submits the same again."""
    words = ["submit", str(request.config), *request.words, "--nodes", str(request.nodes)]
    for override in request.overrides:
        words += ["--set", override]
    for name in ("cluster", "time", "array"):
        if (value := getattr(request, name)) is not None:
            words += [f"--{name}", str(value)]
    return words
