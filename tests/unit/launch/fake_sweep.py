"""``python -m tests.unit.launch.fake_sweep ARGUMENTS``: `sluice sweep` whose runs and evaluations only pretend to work.

A run takes its folder's real lock, logs a loss that follows from its settings, saves after every step, and stops when
it is asked to; what it did is counted in its folder. It imports no torch, and so takes tenths of a second.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import tomllib
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

from launch import cli, local, sweep
from pipeline.config import load, provenance
from pipeline.record.lock import RunLock
from pipeline.record.metrics import MetricsLog, read_last
from pipeline.record.results import Row
from pipeline.record.state import State, read_state, write_state

PAUSE = "FAKE_SWEEP_PAUSE"
"""Seconds of a step."""
STEPS = 6


def loss_of(lr: float, seed: int, step: int) -> float:
    """A loss that anybody can work out."""
    return (1 + seed) / (step + lr)


def train(file: Path) -> int:
    """A run, or what is left of it."""
    values = tomllib.loads(file.read_text())
    folder, lr, seed = Path(values["run"]["folder"]), values["optimizer"]["lr"], values["run"]["seed"]
    asked: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.append(number))
    lock = RunLock(folder)
    lock.take()
    count(folder, "starts")
    before = read_state(folder)
    attempt = before.attempt + 1 if before else 0
    done = read_last(folder).get("step", 0)
    write_state(folder, State("running", None, done, attempt))
    (folder / "config.toml").write_text(file.read_text())
    if lr > 1e3:
        config = provenance.digest(load.load_run(file))
        error = "step 1: the loss of rank 0 is nan"
        write_state(folder, State("failed", 70, done, attempt, error=error, config=config))
        return 70
    with closing(MetricsLog(folder)) as log:
        for step in range(done + 1, STEPS + 1):
            time.sleep(float(os.environ.get(PAUSE, "0")))
            log.append({"step": step, "loss": loss_of(lr, seed, step), "attempt": attempt})
            count(folder, "steps")
            if asked or (folder / "stop").exists():
                (folder / "stop").unlink(missing_ok=True)
                write_state(folder, State("requeue", 75, step, attempt))
                return 75
    write_state(folder, State("finished", 0, STEPS, attempt))
    lock.release()
    return 0


def evaluate(folder: Path) -> int:
    """An evaluation, which fails where the seed is 1."""
    count(folder, "evaluations")
    values = tomllib.loads((folder / "config.toml").read_text())
    if values["run"]["seed"] == 1:
        print("sluice: the stream 'val' has no labels", file=sys.stderr)
        return 2
    lr = values["optimizer"]["lr"]
    origin = {"model": "step 6", "step": STEPS, "evaluation": "knn", "config": "ab", "manifests": {}, "time": "t"}
    row = Row(metric="knn/top1", value=lr, n=100, stderr=0.5, better="higher", split="val", **origin)
    (folder / "results.json").write_text(json.dumps({"version": 3, "results": [asdict(row)]}))
    return 0


def count(folder: Path, what: str) -> None:
    """One more."""
    with open(folder / what, "a") as file:
        file.write(f"{os.getpid()}\n")


def main() -> int:
    """The sweep itself, or what it has started."""
    here = [sys.executable, "-m", __spec__.name]
    if sys.argv[1] == "train":
        return train(Path(sys.argv[3]))
    if sys.argv[1] == "eval":
        return evaluate(Path(sys.argv[2]))
    local.run_command = lambda arguments: [*here, *arguments]
    sweep.eval_command = lambda folder, suite: [*here, "eval", str(folder), suite]
    sweep.check_all = lambda asked: None
    cli.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
