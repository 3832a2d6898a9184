"""Folders of many runs as runs leave them, made by the writers that runs use, without training anything."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path

from pipeline.config.load import dump, load_run
from pipeline.core.evaluation import Number
from pipeline.record.metrics import MetricsLog
from pipeline.record.outputs import keep
from pipeline.record.results import Origin
from pipeline.record.state import Outcome, State, write_state

ROOT = Path(__file__).parents[3]
STEPS = 300


@cache
def _config(lr: float, mask_ratio: float, seed: int) -> str:
    overrides = [f"optimizer.lr={lr}", f"objective.mask_ratio={mask_ratio}", f"run.seed={seed}", "run.folder=FOLDER"]
    return dump(load_run(ROOT / "configs" / "demo" / "mae_glyphs.toml", overrides))


def top1(lr: float, mask_ratio: float, seed: int) -> float:
    """What a run has reached: best at lr 1e-3 and a mask ratio of 0.75, a bit more with each seed."""
    return 0.8 - 0.05 * math.log10(lr / 1e-3) ** 2 - (mask_ratio - 0.75) ** 2 + 0.01 * seed


def make_run(
    folder: Path,
    lr: float = 1e-3,
    mask_ratio: float = 0.75,
    seed: int = 0,
    outcome: Outcome = "finished",
    error: str | None = None,
    lines: int = 30,
) -> Path:
    """A run of 300 steps of which a part was made, and which was evaluated if it has finished."""
    folder.mkdir(parents=True)
    done = STEPS if outcome == "finished" else 100
    (folder / "config.toml").write_text(_config(lr, mask_ratio, seed).replace("FOLDER", str(folder)))
    plan = {"total_steps": STEPS, "samples": 5100, "world_size": 2, "peak_lr": lr}
    versions = {name: "1.2.3" for name in ("torch", "timm", "deepspeed", "accelerate", "numpy", "Pillow")}
    facts = {"time": "2026-01-05T09:41:00+00:00", "command": ["sluice", "train", "x.toml"], "plan": plan}
    (folder / "provenance.json").write_text(json.dumps(facts | {"versions": versions, "folder": "/home/ann"}))
    log = MetricsLog(folder)
    for line in range(1, lines + 1):
        step = done * line // lines
        loss = 1.0 - top1(lr, mask_ratio, seed) * step / STEPS
        speed = {"samples_per_second": 2000.0 + seed, "data_wait": 0.01, "step_seconds": 0.1, "lr": lr}
        log.append({"step": step, "samples": 256 * step, "epoch": step / 20, "loss": loss, **speed, "attempt": 0})
    log.close()
    if outcome == "finished":
        value = top1(lr, mask_ratio, seed)
        for evaluation in ("knn", "linear_probe"):
            numbers = [Number(f"{evaluation}/top1", value, 1200, "val", 0.01)]
            data = {"train": "ab" * 16, "val": "cd" * 16}
            origin = Origin(f"step {done}", done, f"{seed:032x}", evaluation, {"k": 20}, data)
            keep(folder, numbers, origin)
    write_state(folder, State(outcome, {"finished": 0, "failed": 70}.get(outcome, 75), done, 0, error=error))
    return folder
