"""A step of a run, done again from the checkpoint before it: what was in it, and what it did to the gradient.

Order, crops, masks and noise are functions of seed and position, so that nothing but the checkpoint is needed, and any
number of ranks gives the step that was. Nothing in the run's folder is touched but ``replay/step-N``.
"""

from __future__ import annotations

from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED
from pipeline.config.resolve import Plan, phase_learning_rate, resolve
from pipeline.config.schema import RunConfig
from pipeline.core.errors import CheckpointError, ConfigError, NonFiniteError
from pipeline.core.files import replace_file
from pipeline.core.protocols import Batch, Clock, StepOutput
from pipeline.data.dataset import open_data
from pipeline.data.facts import facts
from pipeline.dist.group import Place, by_first, gather_objects, process_group
from pipeline.engine.base import BaseEngine, SingleEngine
from pipeline.engine.checkpoint import CHECKPOINTS, CheckpointStore, Saved
from pipeline.engine.loop import fit
from pipeline.engine.meter import Meter
from pipeline.engine.stopping import StopRequest
from pipeline.engine.surveys import Surveyor
from pipeline.engine.watch import Watch
from pipeline.nn.images import tile
from pipeline.record.console import say
from pipeline.record.files import dumps
from pipeline.record.metrics import read_history
from pipeline.run.attempt import in_folder
from pipeline.run.build import build_stream, build_surveys, sample_batch, tokenizer_of
from pipeline.run.making import make_engine
from pipeline.run.resuming import resume

FOLDER = "replay"
SHOWN = 16
"""Samples in the picture and in the text."""
LAYERS = 10
"""Parameters in the text."""


@dataclass
class Seen:
    """What a rank has seen of the step."""

    step: int
    samples: dict[int, float | None] = field(default_factory=dict[int, float | None])
    """Id to loss; None where the objective does not tell it."""
    images: list[tuple[float, int, Tensor]] = field(default_factory=list[tuple[float, int, Tensor]])
    """Loss, id and image of the worst."""
    gradients: dict[str, float] = field(default_factory=dict[str, float])
    """Norm of every parameter's gradient, over all ranks."""
    not_finite: list[str] = field(default_factory=list[str])
    """Modules whose output was not finite, in the order in which they ran."""


class StopAfter(StopRequest):
    """Asks to stop when a step is done."""

    def __init__(self, folder: Path, meter: Looking) -> None:
        super().__init__(folder)
        self.meter = meter

    def asked(self) -> bool:
        """Whether it is."""
        return self.meter.now >= self.meter.seen.step


class Looking(Meter):
    """A meter that looks closely at one step."""

    def __init__(self, place: Place, seen: Seen, objective: nn.Module) -> None:
        super().__init__(place.device, place.world_size)
        self.seen, self.objective, self.now = seen, objective, 0
        self._hooks: list[Any] = []

    def begin_step(self, step: int) -> None:
        """Watch every module in the step that is looked at."""
        super().begin_step(step)
        self.now = step
        if step == self.seen.step:
            for name, module in self.objective.named_modules():
                if name and not any(module.children()):
                    self._hooks.append(module.register_forward_hook(partial(self._after, name)))

    def _after(self, name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        number = isinstance(output, Tensor) and output.is_floating_point()
        if number and name not in self.seen.not_finite and not bool(output.isfinite().all()):
            self.seen.not_finite.append(name)

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Take in the samples of a micro-batch."""
        if self.now == self.seen.step and not self._updates:
            ids = batch["id"].tolist()
            losses = [None] * len(ids) if output.losses is None else output.losses.float().tolist()
            self.seen.samples |= dict(zip(ids, losses, strict=True))
            if "image" in batch:
                ranks = [-np.inf if loss is None else np.inf if loss != loss else loss for loss in losses]
                rows = zip(ranks, ids, batch["image"].cpu(), strict=True)
                self.seen.images = sorted([*self.seen.images, *rows], key=lambda row: -row[0])[:SHOWN]
        super().add(output, batch)

    def end_step(self, samples: int) -> None:
        """Watch no more."""
        super().end_step(samples)
        while self._hooks:
            self._hooks.pop().remove()

    def watch(self, engine: BaseEngine) -> None:
        """Look at every gradient before its update, which clears it."""
        for _, _, single in engine.turns():
            single.update = partial(self._update, single, single.update)  # pyright: ignore[reportAttributeAccessIssue]

    def _update(self, engine: SingleEngine, update: Any, lr: float) -> Tensor:
        if self.now == self.seen.step:
            for name, parameter in engine.objective.named_parameters():
                if parameter.grad is not None:
                    self.seen.gradients[name] = float(parameter.grad.detach().float().norm())
        return update(lr)


def replay(run: str, step: int) -> int:
    """Do a step again, on all ranks together, and show it.

    Args:
        run: its folder.
        step: which; the first is 1.

    Raises:
        ConfigError: no such step.
    """
    folder = Path(run)
    if step < 1:
        raise ConfigError(f"--step {step}: the first step is 1")
    with ExitStack() as stack:
        config = load.load_run(folder / "config.toml")
        place = stack.enter_context(process_group(config.engine.timeout_minutes))
        store = CheckpointStore(folder / CHECKPOINTS, place, lambda text: say(text) if place.first else None)
        saved = _before(store, step)
        config = _config(config if saved is None else RunConfig.model_validate(saved.state["config"]), folder, step)
        by_first(lambda: in_folder(Path(config.run.folder), lambda: _make(Path(config.run.folder))))
        manifest = by_first(lambda: open_data(config.data))
        plan = resolve(config, manifest.samples, place.world_size, str(folder))
        if step > plan.total_steps:
            raise ConfigError(f"--step {step}: {run} has {plan.total_steps} steps")
        stream = stack.enter_context(closing(build_stream(config, manifest, plan, place)))
        sample, tokenizer = sample_batch(config, manifest), tokenizer_of(config, manifest)
        known, notes = facts(config.data, manifest), []
        engine, _ = make_engine(str(folder), config, known, plan, place, saved, sample, tokenizer, notes)
        clock = Clock(0, 0, plan.total_samples)
        if saved is not None:
            notes += resume(engine, stream, saved)
            clock = Clock(saved.step, saved.state["samples"], plan.total_samples)
        seen = Seen(step)
        meter = Looking(place, seen, engine.objective)
        meter.watch(engine)
        watch = Watch(place.device, StopAfter(Path(config.run.folder), meter))
        surveys = build_surveys(config, manifest, plan, engine, Surveyor(engine, meter, watch, config.run.seed), stack)
        problem = None
        try:
            fit(
                engine=engine,
                stream=stream,
                clock=clock,
                global_batch=plan.global_batch,
                seed=config.run.seed,
                learning_rate=partial(phase_learning_rate, plan),
                actions=surveys,
                meter=meter,
                watch=watch,
            )
        except NonFiniteError as error:
            problem = str(error)
            if meter.now != step:
                raise
        line = meter.line(Clock(step, 0, 0))
        _show(folder, Path(config.run.folder), plan, saved, seen, line, problem, place)
    return FINISHED


def _before(store: CheckpointStore, step: int) -> Saved | None:
    """The newest checkpoint before a step that can be gone on from; None: there is none, so the run begins anew."""
    try:
        return store.newest(to_go_on=True, before=step)
    except CheckpointError as error:
        store.say(f"replaying from the beginning: {error}")
        return None


def _config(config: RunConfig, folder: Path, step: int) -> RunConfig:
    """The run's, in a folder of its own, under the engine that shows its gradients."""
    own = config.run.model_copy(update={"folder": str(folder / FOLDER / f"step-{step:08d}")})
    engine = config.engine.model_copy(update={"name": "accelerate"})
    return config.model_copy(update={"run": own, "engine": engine})


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


def _show(
    folder: Path,
    out: Path,
    plan: Plan,
    saved: Saved | None,
    seen: Seen,
    line: dict[str, Any],
    problem: str | None,
    place: Place,
) -> None:
    """Put together what the ranks have seen; rank 0 writes and prints it."""
    told: list[Seen] = gather_objects(seen)
    if not place.first:
        return
    samples = {sample: loss for rank in told for sample, loss in rank.samples.items()}
    worst = sorted(samples.items(), key=lambda pair: -(np.inf if pair[1] is None or pair[1] != pair[1] else pair[1]))
    modules = next((rank.not_finite for rank in told if rank.not_finite), [])
    logged = next((row for row in read_history(folder).rows if row["step"] == seen.step), None)
    facts = {
        "step": seen.step,
        "from": "the beginning" if saved is None else str(saved.folder),
        "ranks": place.world_size,
        **{name: value for name, value in line.items() if _is_result(name)},
        "logged": None if logged is None else {n: v for n, v in logged.items() if _is_result(n)},
        "problem": problem,
        "not_finite": modules,
        "samples": [{"id": sample, "loss": loss} for sample, loss in worst],
        "gradients": seen.gradients,
    }
    images = sorted((row for rank in told for row in rank.images), key=lambda row: -row[0])[:SHOWN]

    def write() -> None:
        replace_file(out / "replay.json", dumps(facts, indent=1).encode() + b"\n")
        if images:
            Image.fromarray(tile([torch.stack([image for _, _, image in images])])).save(out / "worst.png")

    in_folder(out, write)
    say(_text(facts, out))


def _is_result(name: str) -> bool:
    return name.rpartition("/")[2] in ("loss", "grad_norm", "lr", "data_digest")


def _text(facts: dict[str, Any], out: Path) -> str:
    lines = [f"step {facts['step']}, from {facts['from']}"]
    logged = facts["logged"]
    for name, value in facts.items():
        if _is_result(name):
            was = "" if logged is None else f"   in the log {logged.get(name)}"
            lines.append(f"  {name}: {value}{was}")
    if logged is None:
        lines.append("  the log has no line of this step")
    elif logged["data_digest"] != facts["data_digest"]:
        lines.append("  THE SAMPLES ARE OTHERS than in the log: the data or the code has changed since")
    if facts["problem"]:
        lines += [f"  {facts['problem']}"]
    if facts["not_finite"]:
        lines.append(f"  the first module whose output is not finite: {facts['not_finite'][0]}")
    known = [sample for sample in facts["samples"] if sample["loss"] is not None]
    if known:
        lines.append("  highest losses: " + ", ".join(f"{s['id']} ({s['loss']:.4g})" for s in known[:SHOWN]))
    order = sorted(facts["gradients"].items(), key=lambda pair: -(np.inf if pair[1] != pair[1] else pair[1]))
    lines += ["  largest gradients:", *(f"    {norm:.4g}  {name}" for name, norm in order[:LAYERS])]
    return "\n".join([*lines, f"  all of it: {out}"])
