"""Seconds from the command to the first step: fresh, and resumed at step 10 and at step 10,000 of one epoch.

Resuming must not read what was passed: the three are the same but for the reading of the checkpoint.
Run: ``python -m tests.perf.startup [--rounds 3]``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.glyphs import GlyphsSource
from pipeline.engine.checkpoint import manifest_text

SLUICE = str(Path(sys.executable).with_name("sluice"))
CONFIG = Path(__file__).parents[2] / "configs" / "smoke" / "mae.toml"
FAR = 10_000


def command(folder: Path, shards: Path, steps: int) -> list[str]:
    """A run to ``steps`` that logs each step; two samples a step, so that an epoch is long."""
    settings = {
        "run.folder": folder,
        "data.train": shards,
        "data.workers": 1,
        "run.length": f"{steps}ba",
        "run.global_batch": 2,
        "engine.micro_batch": 2,
        "every.log": "1ba",
        "every.checkpoint": "10ba",
        "every.showcase": "0ba",
    }
    return [SLUICE, "train", str(CONFIG), *(w for k, v in settings.items() for w in ("--set", f"{k}={v}"))]


def first_step(folder: Path, shards: Path, done: int) -> float:
    """Seconds from the command to the line of step ``done + 1``."""
    path = folder / "metrics.jsonl"
    lines = len(path.read_text().splitlines()) if path.exists() else 0
    began = time.perf_counter()
    run = subprocess.Popen(command(folder, shards, done + 2), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while not path.exists() or len(path.read_text().splitlines()) == lines:
        if run.poll() is not None:
            raise RuntimeError(f"the run ended with {run.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - began
    run.wait()
    return seconds


def at_step(source: Path, folder: Path, step: int) -> Path:
    """A run whose newest checkpoint is of ``step``: the position is a number in the checkpoint."""
    shutil.copytree(source, folder)
    checkpoint = folder / "checkpoints" / "step-00000010"
    body = json.loads((checkpoint / "checkpoint.json").read_text())
    body["state"] |= {"step": step, "samples": 2 * step}
    body["state"]["stream"]["step"] = step
    facts = {name: body[name] for name in ("files", "tensors", "state")}
    (checkpoint / "checkpoint.json").write_bytes(manifest_text(facts))
    checkpoint.rename(checkpoint.with_name(f"step-{step:08d}"))
    return folder


def main() -> None:
    """Print the medians and their ratios to the fresh start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {"fresh": [], "step 10": [], f"step {FAR}": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(GlyphsSource(characters=200, samples=8, size=32), folder / "shards", Options())
        shards = folder / "shards" / "train"
        base = folder / "base"
        subprocess.run(command(base, shards, 10), check=True, capture_output=True)
        for round_ in range(rounds):
            seconds["fresh"].append(first_step(folder / f"fresh{round_}", shards, 0))
            seconds["step 10"].append(first_step(at_step(base, folder / f"near{round_}", 10), shards, 10))
            seconds[f"step {FAR}"].append(first_step(at_step(base, folder / f"far{round_}", FAR), shards, FAR))
    fresh = statistics.median(seconds["fresh"])
    for what, found in seconds.items():
        median = statistics.median(found)
        print(
            f"{what:>12}: {median:5.2f} s to the first step ({median / fresh:.2f} of a fresh start; {len(found)} runs)"
        )


if __name__ == "__main__":
    main()
