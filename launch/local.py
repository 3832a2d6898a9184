"""Training on this machine: the command of one process, or of DeepSpeed's launcher for several."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.supervise import supervise
from pipeline.config.schema import RunConfig
from pipeline.core.errors import LaunchError

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
    arguments = ["train", "--config", str(path)]
    for override in overrides:
        arguments += ["--set", override]
    environment = child_environment(procs)
    command = run_command(arguments) if procs == 1 else deepspeed_command("pipeline.run", arguments, procs, environment)
    return supervise(command, Path(config.run.folder), environment)


def child_environment(procs: int) -> dict[str, str]:
    """The environment of a run: this one, and what its ranks need that is not set already."""
    environment = dict(os.environ)
    environment["PYTHONSAFEPATH"] = "1"  # a folder named "pipeline" where the command is run is not our package
    if not _CUDA.is_dir() or environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    if procs > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // procs)))
    return environment


def run_command(arguments: Sequence[str]) -> list[str]:
    """One process of :mod:`pipeline.run`."""
    return [sys.executable, "-m", "pipeline.run", *arguments]


def deepspeed_command(module: str, arguments: Sequence[str], procs: int, environment: dict[str, str]) -> list[str]:
    """DeepSpeed's launcher for ``procs`` ranks of ``module`` on this machine.

    Raises:
        LaunchError: ``CUDA_VISIBLE_DEVICES`` names fewer devices than ranks, or none that DeepSpeed can choose.
    """
    options = [f"--num_gpus={procs}"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and environment.get("DS_ACCELERATOR") != "cpu":
        # With --num_gpus alone the launcher forgets CUDA_VISIBLE_DEVICES and takes devices 0, 1, ...
        devices = visible.split(",")
        if len(devices) < procs or not all(d.strip().isdigit() for d in devices):
            raise LaunchError(
                f"CUDA_VISIBLE_DEVICES={visible} does not name {procs} devices by number; change it, or --procs"
            )
        options = [f"--include=localhost:{','.join(d.strip() for d in devices[:procs])}"]
    return [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=critical"),
        f"--hostfile={os.devnull}",  # never a /job/hostfile that happens to be there
        *options,
        f"--master_port={free_port()}",
        *("--no_local_rank", "--module", module),
        *arguments,
    ]


def free_port() -> int:
    """A port that is free at this moment on the loopback interface."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
