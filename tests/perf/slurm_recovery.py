"""Seconds from a SIGKILL of one rank to the next training step, in a job of a real SLURM on this machine.

The demo's MAE on two nodes of one rank each; the job's agent starts the ranks again inside the allocation. The peer is
the same job's first start, from submission to its first step: what a new submission would cost at the least. Needs
root, slurm-wlm and munge. Run: ``python -m tests.perf.slurm_recovery [--kills 3]``.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.glyphs import GlyphsSource
from launch import history, submit
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import Run, environment

CONFIG = Path(__file__).parents[2] / "configs" / "demo" / "mae_glyphs.toml"


def start(cluster: Cluster, folder: Path) -> Run:
    """Submit the demo's run."""
    build(GlyphsSource(characters=50, samples=2, size=32), folder / "shards", Options(shard_samples=200))
    settings = [
        f"run.folder='{folder}/run'",
        f"data.train='{folder}/shards/train'",
        "run.length=100000ba",
        "every.log=1ba",
        "every.checkpoint=20ba",
        "every.showcase=0ba",
    ]
    with environment(cluster):
        submit.submit(submit.Request(CONFIG, settings, nodes=2), dry_run=False)
    job = history.last_job(folder / "run")
    assert job is not None
    return Run(cluster, folder / "run", job)


def measure(kills: int) -> tuple[float, list[float]]:
    """Seconds of the first start, and from each kill to the next step."""
    with Cluster(["n1", "n2"]) as cluster, tempfile.TemporaryDirectory() as folder:
        job = start(cluster, Path(folder))
        submitted = time.time()
        first = job.seconds_to_next_step(submitted, attempt=0)
        seconds = []
        for kill in range(kills):
            known = job.lines()[-1]["step"]
            job.wait_step(known + 25, kill)  # another checkpoint, so that this is no failure at the same step
            os.kill(job.beat(1).pid, signal.SIGKILL)
            seconds.append(job.seconds_to_next_step(time.time(), kill + 1))
        return first, seconds


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    kills = parser.parse_args().kills
    if reason := why_not():
        print(f"not run: {reason}")
        return 0
    first, seconds = measure(kills)
    print(f"submission to first step   {first:6.1f} s")
    shown = ", ".join(f"{s:.1f}" for s in seconds)
    print(f"SIGKILL to next step       {statistics.median(seconds):6.1f} s, median of {shown} (must be under 60)")
    print(f"ratio                      {statistics.median(seconds) / first:6.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
