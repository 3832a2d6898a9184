"""A run folder as a run of two attempts would leave it, made without training anything."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from pipeline.core.evaluation import Figure, Number, Output, Table
from pipeline.core.protocols import Picture
from pipeline.record.files import Lines
from pipeline.record.metrics import MetricsLog
from pipeline.record.notes import FILE as NOTES
from pipeline.record.outputs import keep
from pipeline.record.results import Origin
from pipeline.record.showcase import save_pictures
from pipeline.record.state import State, write_state

BATCH = 256
EVIL = "<script>alert('x')</script> & \"quoted\""


def metrics_row(step: int, attempt: int, rng: np.random.Generator) -> dict[str, float | int | str]:
    """A line with what an engine would log at ``step`` of 3000."""
    done = step / 3000
    loss = 0.35 + 0.65 * math.exp(-6 * done) + 0.02 * rng.standard_normal()
    return {
        "step": step,
        "samples": step * BATCH,
        "epoch": step * BATCH / 50_000,
        "loss": loss,
        "mask/visible": 0.25,
        "quartile/1": loss * 1.4,
        "quartile/2": loss * 1.1,
        "quartile/3": loss * 0.9,
        "quartile/4": loss * 0.7,
        "pixel_std": 0.2 + 0.1 * done,
        "lr": 1.5e-4 * min(done / 0.05, 0.5 + 0.5 * math.cos(math.pi * done)),
        "grad_norm": float(np.exp(rng.normal(-0.5, 0.2))) * (60 if step == 700 else 1),
        "samples_per_second": 2100 + 60 * rng.standard_normal() - (900 if step in (400, 1210) else 0),
        "data_wait": abs(0.01 * rng.standard_normal()) + 0.01,
        "step_seconds": 0.12,
        "memory_gb": 11.2,
        "data_digest": f"{step:016x}",
        "attempt": attempt,
    }


def picture(step: int, size: tuple[int, int] = (192, 768)) -> Picture:
    """A smooth pattern that becomes clearer with the steps."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]] / size[0]
    clear = np.stack([np.sin(6 * x + k) * np.cos(5 * y + k) for k in range(3)], -1) * 0.5 + 0.5
    noise = np.random.default_rng(step).random((size[0] // 8, size[1] // 8, 3)).repeat(8, 0).repeat(8, 1)
    part = min(1.0, step / 3000)
    return Picture((255 * (part * clear + (1 - part) * noise)).astype(np.uint8), f"original, masked, restored {EVIL}")


def write_run(folder: Path, every: int = 10) -> Path:
    """Fill ``folder``: killed after step 1490, resumed from 1200, finished at 3000, evaluated three times."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    log = MetricsLog(folder)
    for attempt, steps in enumerate([range(every, 1500, every), range(1200 + every, 3001, every)]):
        for step in steps:
            row = metrics_row(step, attempt, rng)
            log.append(row | ({"grad_norm": math.inf} if step == 900 else {}))
    log.close()
    notes = Lines(folder / NOTES)
    text = f"resumed from step 1,200; passed over step-00001400: its hash differs {EVIL}"
    notes.append({"time": "2026-01-05T10:03:11+00:00", "attempt": 1, "text": text})
    notes.close()
    for step in (500, 1000, 2000, 3000):
        save_pictures(folder, step, {"reconstruction": picture(step), "samples": picture(step, (64, 64))})
    manifests = {"train": "ab" * 16, "val": "cd" * 16}
    measured = {None: (0.213, 98.0), 1000: (0.612, 41.5), 2000: (0.701, 24.2), 3000: (0.754, 17.9)}
    for at, (top1, frechet) in measured.items():
        model = f"step {at}" if at else "random init"
        knn = [
            Number("knn/top1", top1 - 0.04, 5000, "val", 0.0061),
            Number("knn/top5", top1 + 0.1, 5000, "val", 0.0041),
        ]
        probe = [
            Number("linear_probe/top1", top1, 5000, "val", 0.006),
            Number("frechet", frechet, 5000, "val", 0.3, "lower"),
        ]
        classes = [(f"class {i} {EVIL}" if i == 3 else f"class {i}", 50, top1 - i / 500) for i in range(100)]
        shown: list[Output] = [
            Table(f"zero_shot/classes {EVIL}", ("class", "images", f"recall {EVIL}"), classes, "val"),
            Figure("embedding_map/classes", picture(at or 0, (96, 144)).image, f"by class {EVIL}", "val"),
        ]
        for name, results in (("knn", knn), ("linear_probe", probe), ("shown", shown)):
            keep(folder, results, Origin(model, at, f"{at}" * 16, name, {"k": 20}, manifests))
    write_state(folder, State("finished", 0, 3000, 1))
    start = {
        "time": "2026-01-05T09:41:00+00:00",
        "command": ["sluice", "train", "configs/demo/mae_glyphs.toml", "--set", "run.name=<b>x</b>"],
        "host": "node-017",
        "python": "3.11.9",
        "git": {"commit": "0123456789abcdef", "dirty": True, "diff": "code-1234.diff"},
        "versions": {"torch": "2.8.0", "deepspeed": "0.17.2"},
        "world_size": 2,
        "plan": {"total_steps": 3000},
    }
    again = start | {"time": "2026-01-05T10:03:10+00:00", "host": "node-018", "earlier": [start]}
    (folder / "provenance.json").write_text(json.dumps(again))
    config = (
        f'# {EVIL}\n[run]\nfolder = "runs/mae"\nlength = "3000ba"\nglobal_batch = 256\n\n[objective]\nname = "mae"\n'
    )
    (folder / "config.toml").write_text(config + "mask_ratio = 0.75\n")
    return folder
