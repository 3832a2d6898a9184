"""Seconds that `sluice status`, `eval --list` and `submit --dry-run` take, beside an interpreter that does nothing.

What must hold: under half a second each, of `sluice eval --list` 0.3, with no framework imported (that is a test, of
tests/unit/launch).
Run: ``python -m tests.perf.cli_speed [--rounds 15]``.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.core.manifest import Manifest, Shard, save
from pipeline.record.beats import Pulse
from pipeline.record.metrics import MetricsLog
from pipeline.record.state import State, write_state

ROOT = Path(__file__).parents[2]
RANKS = 64
LINES = 5000


def make_run(folder: Path) -> None:
    """A run of many ranks that has logged much."""
    (folder / "logs").mkdir(parents=True)
    lines = MetricsLog(folder)
    for step in range(1, LINES + 1):
        facts = {"step": step, "samples": 8 * step, "epoch": 0.1, "loss": 0.5, "step_seconds": 2.0}
        lines.append(facts | {"samples_per_second": 4.0, "data_wait": 0.1})
    lines.close()
    write_state(folder, State("running", None, LINES, 0))
    for rank in range(RANKS):
        pulse = Pulse(folder, rank, 0)
        pulse.at("step", LINES)
        pulse.close()
        (folder / "logs" / f"rank-{rank:05d}.log").write_text("=== rank\n" + "an ordinary line\n" * 20_000)


def commands(folder: Path) -> dict[str, list[str]]:
    """What is timed."""
    run, shards = folder / "runs" / "one", folder / "shards"
    make_run(run)
    shards.mkdir()
    (shards / "a.tar").write_bytes(bytes(10240))
    save(Manifest(root=str(shards), shards=(Shard("a.tar", 800, 10240, "0" * 64),), fields={"image": ("png",)}), shards)
    config = str(ROOT / "configs" / "smoke" / "mae.toml")
    settings = ["--set", f"data.train='{shards}'", "--set", f"run.folder='{folder}/new'"]
    sluice = [sys.executable, "-m", "launch"]
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        f"sluice status RUN ({RANKS} ranks)": [*sluice, "status", str(run)],
        "sluice status (10 runs)": [*sluice, "status", *[str(run)] * 10],
        "sluice eval --list": [*sluice, "eval", "--list"],
        "sluice submit --dry-run": [*sluice, "submit", config, *settings, "--dry-run"],
    }


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        timed = commands(Path(name))
        seconds: dict[str, list[float]] = {what: [] for what in timed}
        busy: dict[str, list[float]] = {what: [] for what in timed}
        for _ in range(rounds):
            for what, command in timed.items():
                began, worked = time.perf_counter(), processor_seconds()
                subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
                seconds[what].append(time.perf_counter() - began)
                busy[what].append(processor_seconds() - worked)
    for what, found in seconds.items():
        spread = f"{min(found):.3f} to {max(found):.3f}, {rounds} times"
        print(
            f"{what:>32}: {statistics.median(found):.3f} s ({spread}), {statistics.median(busy[what]):.3f} s of a core"
        )


def processor_seconds() -> float:
    """That ended child processes have worked: what a machine with other work to do does not blur."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
