"""SLURM's commands, as far as a job and its owner need them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

from launch.decide import Queue
from pipeline.core.errors import LaunchError

T = TypeVar("T")
COMMAND_SECONDS = 60.0
"""A controller that does not answer for so long is not waited for."""
LISTING_SECONDS = 15.0
"""What a person waits for when the controller is slow."""
ROLL_CALL_SECONDS = {"true": 20.0, "nvidia-smi": 60.0}
"""A node on which this has not ended well in this time is taken for lost. nvidia-smi fails where a GPU is gone."""
REQUEUE_SECONDS = 10
"""From queueing a job again to its next start at the earliest: long enough for its processes to go. SLURM itself holds
a job for two minutes, unless its start has been set to a time that is still to come when it has ended."""
RETRY_SECONDS = (1.0, 5.0, 20.0, 60.0, 120.0, 300.0, 600.0, 900.0)
"""Between two times of asking a controller that is away: half an hour in all, as long as its maintenance may take."""
_UNSOUND = ("down", "drain", "fail", "unk", "error", "reboot", "power")


_LIMIT = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+)(?::(?P<minutes>\d+)(?::(?P<seconds>\d+))?)?|"
    r"(?P<m>\d+)(?::(?P<s>\d+))?|(?P<hh>\d+):(?P<mm>\d+):(?P<ss>\d+))"
)


OWN = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER", "SLURM_JWT")
"""Variables that say which SLURM is meant."""
SUBMITTER = (
    *("SBATCH_ACCOUNT", "SBATCH_CLUSTERS", "SBATCH_CONSTRAINT", "SBATCH_PARTITION", "SBATCH_QOS"),
    *("SBATCH_RESERVATION", "SBATCH_TIMELIMIT", "SBATCH_WCKEY"),
)
"""What people set once for all their jobs: where they run and who pays. A profile's own word goes before."""
_COMMANDS = ("SLURM_", "SBATCH_", "SRUN_", "SALLOC_", "SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")
_FILTERS = ("SQUEUE_", "SINFO_", "SCANCEL_", "SCONTROL_")


def submission(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a submission, without what would change its shape behind the plan's back.

    Of what SLURM's commands read by themselves only :data:`OWN` and :data:`SUBMITTER` stay: the rest (SBATCH_EXPORT,
    SBATCH_WAIT, SBATCH_ARRAY_INX, SBATCH_MEM_PER_NODE, SRUN_CPUS_PER_TASK, a job's own SLURM_NTASKS ...) decides how
    many processes there are, what they get and see, or whether the command comes back.
    """
    return {n: v for n, v in environment.items() if not n.startswith(_COMMANDS) or n in (*OWN, *SUBMITTER)}


def question(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a question to SLURM: nothing that filters or formats the answer, or asks back."""
    kept = {n: v for n, v in environment.items() if not n.startswith(_FILTERS)}
    return kept | {"SLURM_TIME_FORMAT": "standard"}


class MissingCommand(LaunchError):
    """A command of SLURM's that is not installed here."""


class Facts(NamedTuple):
    """What the controller says of a job."""

    state: str
    reason: str
    restarts: int


def call(*command: str, environment: Mapping[str, str] | None = None, seconds: float = COMMAND_SECONDS) -> str:
    """Run one of SLURM's commands and return what it prints.

    Raises:
        LaunchError: it is not there, does not answer, or refuses; with its own words.
    """
    try:
        done = subprocess.run(
            command,
            env=question(os.environ) if environment is None else environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except FileNotFoundError as error:
        there = "in this job; its nodes need SLURM's commands" if "SLURM_JOB_ID" in os.environ else "on this machine"
        advice = "" if "SLURM_JOB_ID" in os.environ else "; submit from a login node of the cluster"
        raise MissingCommand(f"{command[0]} is not {there}{advice}") from error
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{command[0]} did not answer in {seconds:.0f} s; is SLURM's controller up?") from error
    if done.returncode:
        raise LaunchError(f"{command[0]} refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def patiently(ask: Callable[[], T]) -> T:
    """What ``ask`` returns, also when the controller is away for some minutes, as while it is started anew.

    Raises:
        LaunchError: the last one of ``ask``.
    """
    for wait in RETRY_SECONDS:
        try:
            return ask()
        except MissingCommand:  # does not come by waiting
            raise
        except LaunchError:
            time.sleep(wait)
    return ask()


def states(jobs: Mapping[str, str]) -> dict[str, str]:
    """Jobs that SLURM still knows as queued or running, with their state; tasks of an array count for it.

    Args:
        jobs: number to name, "" if that is not known; a job of another name has only the same number. A task of an
            array is "12_3", the array "12".
    """
    if not jobs:
        return {}
    # One line for each task of an array, also of those that wait.
    asked = ("squeue", "--noheader", "--array", "--me", "--format=%F %A %i %T %j")
    rows = [line.split(maxsplit=4) for line in call(*asked, seconds=LISTING_SECONDS).splitlines()]
    return {
        job: state
        for job, name in jobs.items()
        for array, single, task, state, *found in rows
        if job in (array, single, task) and name in ("", *found)
    }


def facts(job: str) -> Facts:
    """Of a job that is queued, running or has just ended."""
    text = call("scontrol", "--oneliner", "show", "job", job)
    found = {key: re.search(rf" {key}=(\S+)", text) for key in ("JobState", "Reason", "Restarts")}
    values = {key: match[1] if match else "" for key, match in found.items()}
    return Facts(values["JobState"], values["Reason"], int(values["Restarts"] or 0))


def queue_of(now: Facts, restart: int) -> Queue:
    """What SLURM does with a job of which it has been started ``restart`` times again."""
    if now.restarts > restart:
        return "requeueing"
    if now.state == "RUNNING":
        return "ours"
    return "timeout" if now.reason == "TimeLimit" else "cancelled"


def limit_seconds(limit: str) -> float | None:
    """A time limit as sbatch reads it ("90", "90:00", "1:30:00", "2-12", "2-12:00:00"); None: there is none.

    Raises:
        LaunchError: sbatch would not take it.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = _LIMIT.fullmatch(limit)
    if found is None:
        raise LaunchError(f"time limit {limit!r}: write it like 24:00:00 or 2-12:00:00 (days-hours:minutes:seconds)")
    n = {name: int(value or 0) for name, value in found.groupdict().items()}
    minutes = 60 * (24 * n["days"] + n["hours"] + n["hh"]) + n["minutes"] + n["m"] + n["mm"]
    return 60.0 * minutes + n["seconds"] + n["s"] + n["ss"]


def end_time(job: str) -> float | None:
    """When the job's time is up, in seconds since 1970; None: never."""
    if known := os.environ.get("SLURM_JOB_END_TIME"):
        return float(known)
    text = call("squeue", "--noheader", f"--jobs={job}", "--format=%e")
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def node_names(nodes: str) -> list[str]:
    """n[1-2] as n1, n2."""
    try:
        return call("scontrol", "show", "hostnames", nodes).split()
    except MissingCommand:
        return expanded(nodes)


def expanded(nodes: str) -> list[str]:
    """A list of nodes as SLURM writes it, "a[1-2,07],b", name by name."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", nodes):
        found = [""]
        for literal, numbers in re.findall(r"([^\[]+)|\[([^\]]*)\]", part):
            ends = [literal] if literal else [n for one in numbers.split(",") for n in _counted(*one.split("-"))]
            found = [name + end for name in found for end in ends]
        names += found
    return names


def _counted(first: str, last: str | None = None) -> list[str]:
    """07 to 10, with as many digits."""
    return [str(n).zfill(len(first)) for n in range(int(first), int(last or first) + 1)]


def unsound(nodes: Sequence[str], *, alive: bool) -> dict[str, str]:
    """Those of an allocation's nodes that are down, drained, start no process or have lost a GPU, with the reason.

    If none answers it is not the nodes' fault.

    Args:
        nodes: names.
        alive: whether processes can be started; in a job that SLURM is ending they cannot.
    """
    lines = call("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N %T").splitlines()
    bad: dict[str, str] = {}
    for line in lines:
        node, state = line.split()
        if state.endswith("*") or state.startswith(_UNSOUND):
            bad[node] = f"is {state}"
    left: list[str] = [n for n in nodes if n not in bad]
    if left and alive and (bad or not _answers(left)):
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(_answers, ([node] for node in left)))
        if any(answers):
            bad |= {
                node: f"cannot run `{_roll_call()}`" for node, sound in zip(left, answers, strict=True) if not sound
            }
    return bad


def usable(partition: str) -> set[str]:
    """Nodes of a partition that run jobs, or could."""
    lines = call("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T").splitlines()
    states = [line.split() for line in lines]
    return {node for node, state in states if not state.endswith("*") and not state.startswith(_UNSOUND)}


def _roll_call() -> str:
    """The command that a sound node can run."""
    return "nvidia-smi" if shutil.which("nvidia-smi") else "true"


def _answers(nodes: Sequence[str]) -> bool:
    """Whether the roll call can be run on each of the nodes."""
    count = str(len(nodes))
    shape = ("--nodes", count, "--ntasks", count, "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}")
    try:
        call("srun", "--kill-on-bad-exit=1", *shape, _roll_call(), seconds=ROLL_CALL_SECONDS[_roll_call()])
    except LaunchError:
        return False
    return True


def requeue(job: str) -> None:
    """Queue this job again; it is ended where it runs.

    Raises:
        LaunchError: SLURM refuses.
    """
    call("scontrol", "requeue", job)


def soon(job: str, exclude: Sequence[str]) -> None:
    """Let a job that is being queued again start soon, without certain nodes.

    Raises:
        LaunchError: SLURM refuses; the job waits for its two minutes, and may get any node.
    """
    without = [f"ExcNodeList={','.join(exclude)}"] if exclude else []
    call("scontrol", "update", f"JobId={job}", f"StartTime=now+{REQUEUE_SECONDS}", *without)


def submit(options: Sequence[str], script: Path, environment: Mapping[str, str]) -> str:
    """Put a job into the queue. Returns its number.

    Raises:
        LaunchError: SLURM refuses.
    """
    out = call("sbatch", "--parsable", *options, str(script), environment=environment)
    return out.splitlines()[-1].partition(";")[0]
