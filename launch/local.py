"""Training here: the command of one process, or of DeepSpeed's launcher for several, on this machine or on more."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from launch.hosts import (
    Order,
    Others,
    Part,
    ask_hosts,
    carried,
    check_port,
    hostfile_of,
    interface,
    read_hostfile,
    runner_command,
    runner_environment,
)
from launch.supervise import CRASH, make_ready, run_session, say, supervise
from pipeline.config.exitcodes import CONFIG, FINISHED, NONFINITE, REQUEUE
from pipeline.config.schema import RunConfig
from pipeline.core.errors import LaunchError

PLACE = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
)
"""What a launcher tells a rank."""
_TORCHRUN = (b"torchrun", b"torch.distributed", b"torch/distributed")
_STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
"""Variables that count how often something was started, and by what."""
_DEEPSPEED = (sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=critical")
_CUDA = Path("/proc/driver/nvidia/gpus")


def train(config: RunConfig, path: Path, overrides: Sequence[str], procs: int) -> int:
    """Run ``pipeline.run train`` in ``procs`` processes until it ends. Returns the exit code of the run.

    Args:
        config: what ``path`` and ``overrides`` say, already checked.
        path: the configuration file.
        overrides: ``key.path=value``.
        procs: ranks to start.

    Raises:
        LaunchError: fewer devices than ranks, or a run folder that cannot be written.
    """
    arguments = train_arguments(path, overrides)
    environment = child_environment(procs)
    command = run_command(arguments) if procs == 1 else deepspeed_command("pipeline.run", arguments, procs, environment)
    return supervise(command, Path(config.run.folder), environment)


def become(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by ``pipeline.run``, so that signals and the exit code are its own."""
    check_alone(os.environ)
    sys.stdout.flush()
    os.execve(sys.executable, run_command(arguments), child_environment(procs=1))


def train_part(config: RunConfig, path: Path, overrides: Sequence[str], part: Part, *, tied: bool = False) -> int:
    """Run this host's ranks of a run on several hosts until they end. Returns the exit code of the run.

    Args:
        config: what ``path`` and ``overrides`` say, already checked.
        path: the configuration file.
        overrides: ``key.path=value``.
        part: which host this is.
        tied: end when standard input does.

    Raises:
        LaunchError: the master's port is taken, the hosts do not see each other, or see :func:`train`.
    """
    folder = Path(config.run.folder)
    procs = part.slots[part.node]
    environment = child_environment(procs)
    named = "GLOO_SOCKET_IFNAME"
    if named not in environment and (name := interface(part)):  # gloo else takes what the host's own name stands for
        environment[named] = name
    if part.first:
        check_port(part)
    others = Others(folder, tied)
    with deepspeed_part("pipeline.run", train_arguments(path, overrides), part, environment) as command:
        if part.first:
            code = supervise(command, folder, environment, others)
        else:  # the first host's rank 0 says how the run ended, perhaps not yet
            status = run_session(command, folder, environment, others)
            code = status if status in (FINISHED, CONFIG, NONFINITE, REQUEUE) else CRASH
    if code not in (FINISHED, REQUEUE):
        others.tell()
    return code


def train_hosts(config: RunConfig, path: Path, overrides: Sequence[str], hostfile: Path) -> int:
    """Run on all hosts of a hostfile, over ssh, until it ends. Returns the exit code of the run.

    Args:
        config: what ``path`` and ``overrides`` say, already checked.
        path: the configuration file, which all hosts can read.
        overrides: ``key.path=value``.
        hostfile: see :func:`launch.hosts.read_hostfile`.

    Raises:
        LaunchError: pdsh is missing, or a host cannot take part.
    """
    hosts = read_hostfile(hostfile)
    if shutil.which("pdsh") is None:
        raise LaunchError("pdsh is not installed here; install it, or start by hand: --nodes, --node-rank, --master")
    folder = Path(config.run.folder)
    environment = child_environment(procs=1)
    environment |= make_ready(folder, environment)
    order = Order(os.getcwd(), str(path), list(overrides), [*hosts], [*hosts.values()], 0, carried(environment))
    order = replace(order, port=ask_hosts(order, folder, environment))
    with hostfile_of([*hosts], [1] * len(hosts)) as one_each:
        return supervise(runner_command(order, one_each), folder, runner_environment(environment), working_folder="/")


def train_arguments(path: Path, overrides: Sequence[str]) -> list[str]:
    """Of :mod:`pipeline.run`."""
    arguments = ["train", "--config", str(path)]
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def child_environment(procs: int) -> dict[str, str]:
    """The environment of a run: this one without a rank's place, and what its ranks need that is not set already."""
    environment = dict(os.environ)
    if not under_torchrun(environment):
        for name in PLACE:
            environment.pop(name, None)
    environment["PYTHONSAFEPATH"] = "1"  # a folder named "pipeline" where the command is run is not our package
    if not _CUDA.is_dir() or environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    if procs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // procs)))
    return environment


def under_torchrun(environment: Mapping[str, str]) -> bool:
    """Whether this process is one that torchrun has started, so that its place is meant."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return False
    pid = os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ValueError):
            return False
        if any(name in words for name in _TORCHRUN):
            return True
    return False


def check_alone(environment: Mapping[str, str]) -> None:
    """Before this process starts what it was asked to: be sure that it is the only one that was.

    Variables of a rank that no launcher has set for this process are of another shell or job: they are not used, and
    that is said.

    Raises:
        LaunchError: srun or mpirun has started several of it.
    """
    for name, starter in _STARTERS.items():
        if (count := environment.get(name, "1")).isdigit() and int(count) > 1:
            raise LaunchError(
                f"{starter} has started this command {count} times ({name}), and each would be a run of its own: give "
                "it once, with --procs N for N ranks on this machine; `sluice submit` starts ranks under SLURM"
            )
    left = [name for name in PLACE if name in environment]
    if left and not under_torchrun(environment):
        say(
            f"{', '.join(left)} in the environment are not of this command's ranks and are not used "
            "(who starts ranks himself gives each of them `python -m pipeline.run train`)"
        )


def run_command(arguments: Sequence[str]) -> list[str]:
    """One process of :mod:`pipeline.run`."""
    return [sys.executable, "-m", "pipeline.run", *arguments]


def deepspeed_command(module: str, arguments: Sequence[str], procs: int, environment: dict[str, str]) -> list[str]:
    """DeepSpeed's launcher for ``procs`` ranks of ``module`` on this machine.

    Raises:
        LaunchError: ``CUDA_VISIBLE_DEVICES`` names fewer devices than ranks, or none that DeepSpeed can choose.
    """
    devices = named_devices(procs, environment)
    # With --num_gpus alone the launcher forgets CUDA_VISIBLE_DEVICES and takes devices 0, 1, ...
    which = f"--include=localhost:{_list(devices)}" if devices else f"--num_gpus={procs}"
    return [
        *_DEEPSPEED,
        f"--hostfile={os.devnull}",  # never a /job/hostfile that happens to be there
        *(which, f"--master_port={free_port()}"),
        *("--no_local_rank", "--module", module),
        *arguments,
    ]


@contextmanager
def deepspeed_part(
    module: str, arguments: Sequence[str], part: Part, environment: dict[str, str]
) -> Generator[list[str]]:
    """DeepSpeed's launcher for this host's ranks of ``module``; see :func:`deepspeed_command`."""
    devices = named_devices(part.slots[part.node], environment) or list(range(part.slots[part.node]))
    # Only the devices of this host matter here; of the others the launcher wants to know how many.
    names = [f"node-{i}" for i in range(len(part.slots))]
    chosen = [_list(devices if i == part.node else range(n)) for i, n in enumerate(part.slots)]
    with hostfile_of(names, [max(devices) + 1 if i == part.node else n for i, n in enumerate(part.slots)]) as hostfile:
        yield [
            *_DEEPSPEED,
            *(f"--hostfile={hostfile}", "--no_ssh", f"--node_rank={part.node}"),
            f"--include={'@'.join(f'{name}:{ids}' for name, ids in zip(names, chosen, strict=True))}",
            *(f"--master_addr={part.address}", f"--master_port={part.port}"),
            *("--no_local_rank", "--module", module),
            *arguments,
        ]


def named_devices(procs: int, environment: dict[str, str]) -> list[int] | None:
    """The devices that ``CUDA_VISIBLE_DEVICES`` names for ``procs`` ranks; None where it names none.

    Raises:
        LaunchError: too few, or not by number.
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if not visible or environment.get("DS_ACCELERATOR") == "cpu":
        return None
    devices = [d.strip() for d in visible.split(",")]
    if len(devices) < procs or not all(d.isdigit() for d in devices):
        raise LaunchError(
            f"CUDA_VISIBLE_DEVICES={visible} does not name {procs} devices by number; change it, or --procs"
        )
    return [int(d) for d in devices[:procs]]


def _list(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


def free_port() -> int:
    """A port that is free at this moment on the loopback interface."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
