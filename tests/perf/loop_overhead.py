"""The whole loop (stream, engine, metrics) against a bare torch loop over the same model and a batch in memory.

ViT-S/16 at 224 in fp32, batch 16, one process. Stretches of the two alternate, so that a machine that slows down slows
down both; the first steps of each of our stretches are not counted, since the loader has read ahead meanwhile.
Run: ``python -m tests.perf.loop_overhead [--rounds 5] [--steps 3]``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from data_prep.build import build
from data_prep.options import Options
from data_prep.sources.glyphs import GlyphsSource
from pipeline.config.resolve import Plan, learning_rate, resolve
from pipeline.config.schema import RunConfig
from pipeline.core.manifest import load
from pipeline.core.protocols import Batch, Clock, Objective, StepContext
from pipeline.data.facts import facts
from pipeline.dist.group import process_group
from pipeline.engine.actions import Action
from pipeline.engine.loop import fit
from pipeline.engine.meter import Meter
from pipeline.engine.stopping import StopRequest
from pipeline.engine.watch import Watch
from pipeline.run.build import build_engine, build_objective, build_stream

BATCH = 16
SKIPPED = 8
"""Steps of each of our stretches that are not counted: more than the loader reads ahead."""


def configuration(shards: Path, folder: Path) -> RunConfig:
    """A classifier, as a person would train it."""
    return RunConfig.model_validate(
        {
            "run": {"folder": str(folder), "length": "1000ep", "global_batch": BATCH},
            "data": {"train": str(shards), "fields": ("image", "label"), "workers": 1, "image": {"size": 224}},
            "objective": {"name": "supervised", "encoder": "vit_small_patch16_224"},
            "optimizer": {"lr": 1e-4},
            "engine": {"name": "accelerate", "precision": "fp32", "micro_batch": BATCH},
        }
    )


def bare_step(objective: Objective, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """What every loop must do."""
    objective(batch, StepContext(0, Clock(0, 0, 1))).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class Alternation:
    """Runs the bare loop between stretches of ours and keeps the seconds per step of both."""

    def __init__(self, config: RunConfig, objective: Objective, batch: Batch, steps: int, meter: Meter) -> None:
        self.objective, self.batch, self.steps, self.meter = objective, batch, steps, meter
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            objective.parameters(), settings.lr, settings.betas, weight_decay=settings.weight_decay
        )
        self.ours: list[float] = []
        self.bare: list[float] = []
        self.began = 0.0

    def after_step(self, clock: Clock) -> None:
        """An action of every step: metrics as in a run, then the turn of the other loop when it has come."""
        self.meter.line(clock)
        turn = clock.step % (SKIPPED + self.steps)
        if turn == SKIPPED:
            self.began = time.perf_counter()
        elif turn == 0:
            self.ours.append((time.perf_counter() - self.began) / self.steps)
            began = time.perf_counter()
            for _ in range(self.steps):
                bare_step(self.objective, self.optimizer, self.batch)
            self.bare.append((time.perf_counter() - began) / self.steps)


def measure(rounds: int, steps: int, folder: Path) -> Alternation:
    """Alternate ``rounds`` times, after a round that is not counted."""
    build(GlyphsSource(characters=40, samples=4, size=96), folder / "shards", Options())
    config = configuration(folder / "shards" / "train", folder / "run")
    manifest = load(config.data.train)
    with process_group(5) as place:
        plan: Plan = resolve(config, manifest.samples, 1)
        total = (rounds + 1) * (SKIPPED + steps) * BATCH
        meter = Meter(place.device, 1)
        with closing(build_stream(config, manifest, plan, place)) as stream:
            known = facts(config.data, manifest)
            engine = build_engine(config, build_objective(config, known, ""), plan, place)
            other = build_objective(config, known, "").train()
            batch = next(stream.batches(0))[0]
            turns = Alternation(config, other, {k: v.clone() for k, v in batch.items()}, steps, meter)
            fit(
                engine=engine,
                stream=stream,
                clock=Clock(0, 0, total),
                global_batch=BATCH,
                seed=0,
                learning_rate=lambda samples, phase: learning_rate(plan, samples),
                actions=[Action("measure", 1, turns.after_step)],
                meter=meter,
                watch=Watch(place.device, StopRequest(folder)),
            )
    return turns


def main() -> None:
    """Print both medians and the overhead."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        turns = measure(args.rounds, args.steps, Path(folder))
    ours, bare = turns.ours[1:], turns.bare[1:]
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    loop, alone = statistics.median(ours), statistics.median(bare)
    print(f"seconds per step (medians of {len(ours)}): loop {loop:.3f}, bare {alone:.3f}")
    print(f"overhead {statistics.median(ratios) - 1:+.1%} (from {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%})")


if __name__ == "__main__":
    main()
