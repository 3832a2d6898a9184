"""Training jobs on the test cluster, submitted as `sluice submit` does, and what became of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from launch import history, submit
from launch.history import Attempt
from pipeline.record.beats import Beat, read_beats
from tests.integration.runs import SMOKE, metrics, overrides
from tests.slurm.cluster import Cluster, wait_for

OWN = ("engine.name=deepspeed", "engine.zero=1", "engine.precision=fp32")
START_SECONDS = 400.0
"""How long ranks may take to start on a machine that has other things to do."""


@dataclass
class Run:
    """A run whose job was submitted."""

    cluster: Cluster
    folder: Path
    job: str

    @property
    def attempts(self) -> list[Attempt]:
        """How the attempts ended so far."""
        return history.attempts(self.folder)

    @property
    def decisions(self) -> list[str]:
        """What followed on each."""
        return [a.decision for a in self.attempts]

    def lines(self) -> list[dict[str, Any]]:
        """Of metrics.jsonl."""
        file = self.folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_step(self, step: int, attempt: int = 0) -> None:
        """Until this attempt has made a step."""

        def made() -> bool:
            return any(line["attempt"] >= attempt and line["step"] >= step for line in self.lines())

        wait_for(made, START_SECONDS, f"step {step} of attempt {attempt}", self.said)

    def seconds_to_next_step(self, since: float, attempt: int = 1) -> float:
        """From ``since`` to the first step that this attempt has made."""
        self.wait_step(0, attempt)
        return time.time() - since

    def wait(self, *states: str) -> None:
        """Until the job is in one of these states of SLURM."""
        wait_for(lambda: self.cluster.state(self.job) in states, START_SECONDS, " or ".join(states), self.said)

    def beat(self, rank: int) -> Beat:
        """The last of a rank."""
        return read_beats(self.folder)[rank]

    def said(self) -> str:
        """What the job has printed."""
        logs = sorted((self.folder / "launch").glob("slurm-*.out"))
        printed = "\n".join(log.read_text() for log in logs)
        return f"{self.cluster.state(self.job)}\n{printed[-4000:]}"

    def same_to_the_end(self, whole: Path) -> None:
        """Wait until it has ended as the undisturbed run did, and nothing of it is left."""
        self.wait("COMPLETED")
        assert metrics(self.folder) == metrics(whole), self.said()
        assert '"finished"' in (self.folder / "state.json").read_text()
        wait_for(lambda: not self.cluster.processes("SLURM_JOB_ID", self.job), 20, "nothing left")


@contextmanager
def environment(cluster: Cluster) -> Iterator[None]:
    """This process as a user of the cluster."""
    with pytest.MonkeyPatch.context() as patch:
        root = str(Path(__file__).parents[2])
        wanted = cluster.environment | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        for name, value in wanted.items():
            patch.setenv(name, value)
        for name in [n for n in os.environ if n.startswith("SLURM_") and n != "SLURM_CONF"]:
            patch.delenv(name)
        yield


def profile(path: Path, **values: Any) -> Path:
    """A cluster's profile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tomli_w.dumps({"stop_seconds": 20, **values}))
    return path


def train(
    cluster: Cluster,
    folder: Path,
    shards: Path,
    *more: str,
    nodes: int = 2,
    pause: float = 0.3,
    die: str | None = None,
    time_limit: str | None = None,
    **values: Any,
) -> Run:
    """Submit a run of 12 steps on some nodes, one rank each. The check that imports torch is left to another test."""
    variables = {"SLUICE_TEST_PAUSE": str(pause)} | ({"SLUICE_TEST_DIE": die} if die else {})
    place = profile(folder.parent / f"{folder.name}.profile.toml", environment=variables, **values)
    settings = overrides(folder, shards, *OWN, *more)
    request = submit.Request(SMOKE / "supervised.toml", settings, nodes, cluster=str(place), time=time_limit)
    with environment(cluster), pytest.MonkeyPatch.context() as patch:
        patch.setattr(submit, "PROGRAM", "tests.slurm.slow_run")
        patch.setattr(submit, "check_there", lambda draft, profile: None)
        submit.submit(request, dry_run=False)
    job = history.last_job(folder)
    assert job is not None
    return Run(cluster, folder, job)
