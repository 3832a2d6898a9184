"""One rank of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.config import load, provenance
from pipeline.config.exitcodes import FINISHED, REQUEUE
from pipeline.config.resolve import Plan, period, phase_learning_rate, resolve
from pipeline.config.schema import RunConfig
from pipeline.core import manifest as manifests
from pipeline.core.errors import NonFiniteError
from pipeline.core.files import replace_file
from pipeline.core.protocols import Batch, Clock, DataFacts, StepContext, Stream
from pipeline.data.dataset import open_data
from pipeline.data.facts import facts
from pipeline.data.selection import Selection, sources
from pipeline.dist.group import Place, by_first, from_first, gather_objects, process_group, sum_over_ranks
from pipeline.dist.waits import Waits
from pipeline.engine.actions import Action
from pipeline.engine.base import BaseEngine
from pipeline.engine.checkpoint import CHECKPOINTS, CheckpointStore
from pipeline.engine.ledger import Ledger
from pipeline.engine.loop import Outcome, fit
from pipeline.engine.meter import Meter
from pipeline.engine.pace import Pace
from pipeline.engine.paces import PaceKeeper
from pipeline.engine.saving import Saver, Series
from pipeline.engine.stopping import StopRequest
from pipeline.engine.surveys import Surveyor
from pipeline.engine.watch import Watch
from pipeline.record.files import Lines, dumps
from pipeline.record.logger import check_loggers
from pipeline.record.losses import LossFiles
from pipeline.record.paces import Stragglers
from pipeline.record.recorder import Recorder
from pipeline.record.report import write_report
from pipeline.record.state import close_state
from pipeline.run import frozen
from pipeline.run.attempt import Attempt, attempt, in_folder
from pipeline.run.build import (
    build_stream,
    build_surveys,
    sample_batch,
    text_reader,
    tokenizer_of,
)
from pipeline.run.collapse import CollapseWatch
from pipeline.run.making import make_engine
from pipeline.run.online import Judge
from pipeline.run.preflight import preflight
from pipeline.run.resuming import Beginning, find_beginning, resume
from pipeline.run.rivalry import RivalryWatch

NONFINITE = "nonfinite.json"
"""In the run folder: the samples of the last step whose loss or gradient was not finite."""


@dataclass
class Job:
    """The parts of a training run on one rank, and what is done with them every so often."""

    config: RunConfig
    place: Place
    plan: Plan
    manifest: manifests.Manifest
    facts: DataFacts
    origins: frozen.Origins
    """Files of the objective's frozen parts."""
    engine: BaseEngine
    stream: Stream
    saver: Saver
    meter: Meter
    sample: Batch
    tokenizer: bytes | None
    """The file of what reads texts; None: there are none."""
    recorder: Recorder | None
    """On rank 0."""
    surveyor: Surveyor
    surveys: list[Action]
    judge: Judge | None = None
    """Evaluates while it trains; None: nobody does."""
    collapse: CollapseWatch = field(default_factory=CollapseWatch)
    rivalry: RivalryWatch = field(default_factory=RivalryWatch)

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.folder)

    def learning_rate(self, samples: int, phase: str) -> float:
        """Of a phase's update that starts after ``samples`` samples."""
        return phase_learning_rate(self.plan, samples, phase)

    def log(self, clock: Clock) -> None:
        """One line of metrics, and this rank's bad samples."""
        self.meter.keep()
        line = self.meter.line(clock)
        line["epoch"] = clock.step / self.plan.steps_per_epoch
        events = self.stream.events()
        counts = sum_over_ranks(torch.tensor([*events.values()], device=self.place.device)).tolist()
        line |= dict(zip(events, counts, strict=True))
        if self.recorder is not None:
            self.recorder.log(line.pop("step"), line)
            self.collapse.look(clock, line, self.recorder.note)
            self.rivalry.look(clock.step, line, self.recorder.note)
        bad = [*self.stream.ledger(), *self.surveyor.ledger()]
        if bad:
            with closing(Lines(self.folder / f"ledger-{self.place.rank:05d}.jsonl")) as ledger:
                for sample in bad:
                    ledger.append(sample)

    def checkpoint(self, clock: Clock) -> None:
        """Save everything that resuming and evaluating need."""
        self.meter.keep()
        state = {
            "step": clock.step,
            "samples": clock.samples,
            "stream": self.stream.state(clock.step),
            "config": self.config.model_dump(mode="json", exclude_none=True),
            "facts": self.facts.plain(),
            frozen.STATE: self.origins,
            "versions": provenance.versions(),
        }
        if self.tokenizer is not None:  # it is a part of the model, and the data set may be gone when that is used
            state["tokenizer"] = self.tokenizer.decode()
        self.saver.save(clock.step, self.engine.written(), state)

    def keep(self, clock: Clock) -> None:
        """Save what is to stay, unless that is done."""
        if self.saver.last != clock.step:
            self.checkpoint(clock)

    def showcase(self, clock: Clock) -> None:
        """The objective's pictures, with the averaged weights where there are any."""
        objective = self.engine.objective
        objective.eval()
        with torch.no_grad(), self.engine.averaged(), self.engine.whole_parameters():
            words = text_reader(self.config, self.tokenizer)
            ctx = StepContext(self.config.run.seed, clock, training=False, words=words)
            pictures = objective.showcase(self.engine.move(self.sample), ctx)
        objective.train()
        if self.recorder is not None:
            self.recorder.pictures(clock.step, pictures)

    def not_finite(self, step: int, problem: str) -> None:
        """Write down whose samples the step was made of; all ranks together."""
        told = gather_objects(self.meter.samples(step))
        if self.recorder is None:
            return
        samples = {
            f"rank {rank}": [{"id": sample, "loss": loss} for sample, loss in own.items()]
            for rank, own in enumerate(told)
        }
        facts = {"step": step, "problem": problem, "samples": samples}
        in_folder(self.folder, lambda: replace_file(self.folder / NONFINITE, dumps(facts, indent=1).encode() + b"\n"))
        self.recorder.note(
            f"the samples of step {step} are in {self.folder / NONFINITE}; which of them and which layer it was, shows "
            f"sluice replay {self.folder} --step {step}"
        )

    def actions(self) -> list[Action]:
        """In the order in which they run: a line that is in the log belongs to the checkpoint that follows it."""
        looks = [] if self.judge is None else self.judge.actions()
        return [
            *looks[:1],  # before surveys, which may change buffers: as the checkpoint of that step has them
            *self.surveys,
            Action("log", self.plan.log_every, self.log),
            Action("checkpoint", self.plan.checkpoint_every, self.checkpoint),
            Action("checkpoint", self.saver.series.every if self.saver.series else 0, self.keep, at_end=False),
            Action("showcase", self.plan.showcase_every, self.showcase),
            *looks[1:],
        ]

    def end(self, outcome: Outcome, clock: Clock, stop: StopRequest) -> int:
        """Wait for the last checkpoint, say how it ended, on rank 0, and give the exit code."""
        self.meter.at("end")
        self.saver.finish()
        ended = outcome is Outcome.FINISHED or (self.judge is not None and self.judge.ended)
        code = FINISHED if ended else REQUEUE
        if self.recorder is not None:
            if not ended:
                self.recorder.note(f"stopped at step {clock.step}: {stop.reason or 'another rank was asked to'}")
                stop.file.unlink(missing_ok=True)
            name = "finished" if ended else "requeue"
            close_state(self.folder, name, code, step=clock.step)
            self.recorder.note(f"report: {write_report(self.folder)}")
        from_first(None)  # srun ends all ranks as soon as one has left with another code than 0
        return code


def train(path: str, overrides: Sequence[str]) -> int:
    """Train, on this rank, to the end or until asked to stop. Returns the exit code."""
    config = load.load_run(path, overrides)
    check_loggers(config.record.loggers)
    stop = StopRequest(Path(config.run.folder))
    stop.listen()
    with ExitStack() as stack:
        place = stack.enter_context(process_group(config.engine.timeout_minutes))
        manifest = by_first(lambda: open_data(config.data))  # one reads what decides the samples
        plan = resolve(config, manifest.samples, place.world_size, path)
        start = stack.enter_context(attempt(config, place))
        notes = load.dropped(path, overrides)
        store = CheckpointStore(Path(config.run.folder) / CHECKPOINTS, place, notes.append)
        beginning = find_beginning(config, plan, store, path)
        start.begin(plan, stop)
        nodes = preflight(Path(config.run.folder), place)
        waits = stack.enter_context(Waits(place.device).listening())
        stream = stack.enter_context(closing(build_stream(config, manifest, plan, place)))
        sample, tokenizer = sample_batch(config, manifest), tokenizer_of(config, manifest)
        known = facts(config.data, manifest)
        engine, origins = make_engine(path, config, known, plan, place, beginning.saved, sample, tokenizer, notes)
        if beginning.saved is not None:
            notes += resume(engine, stream, beginning.saved)
        recorder = _recorder(config, plan, place, start, beginning, notes)
        if recorder is not None:
            stack.enter_context(closing(recorder))
        clock = beginning.clock
        start.pulse.at("start", clock.step)
        meter = Meter(place.device, place.world_size, start.pulse, _ledger(config, manifest), Pace(waits))
        series = Series(period(plan, config.run.keep_every), config.run.keep_optimizer)
        saver = Saver(store, config.run.keep, start.saved if place.first else lambda step: None, series)
        watch = Watch(place.device, stop, saver, _paces(config, start, nodes, recorder))
        surveyor = Surveyor(engine, meter, watch, config.run.seed)
        surveys = build_surveys(config, manifest, plan, engine, surveyor, stack)
        parts = (engine, stream, saver, meter, sample, tokenizer, recorder, surveyor, surveys)
        job = Job(config, place, plan, manifest, known, origins, *parts)
        if config.online is not None:
            job.judge = Judge(job, watch, clock.step)
        try:
            outcome, clock = fit(
                engine=job.engine,
                stream=stream,
                clock=clock,
                global_batch=plan.global_batch,
                seed=config.run.seed,
                learning_rate=job.learning_rate,
                actions=job.actions(),
                meter=job.meter,
                watch=watch,
            )
        except NonFiniteError as error:
            job.saver.finish()  # what is being written is of an earlier step, and good
            if error.step is not None:
                job.not_finite(error.step, str(error))
            raise
        return job.end(outcome, clock, stop)


def _ledger(config: RunConfig, manifest: manifests.Manifest) -> Ledger | None:
    """What keeps the losses of samples, where that is wanted; all ranks together."""
    if config.record.losses == "never":
        return None
    files = LossFiles(Path(config.run.folder), manifest.samples)
    sets = [(m.root, m.samples, m.kept if isinstance(m, Selection) else None) for m in sources(manifest)]
    by_first(lambda: in_folder(files.folder, lambda: files.describe(sets)))
    return Ledger(files)


def _paces(config: RunConfig, start: Attempt, nodes: list[str], recorder: Recorder | None) -> PaceKeeper | None:
    """On rank 0: what names the ranks that stay slow."""
    if recorder is None:
        return None
    judge = Stragglers(nodes, config.engine.slow_percent)
    return PaceKeeper(start.folder, start.number, judge, config.engine.slow_minutes, recorder.note)


def _recorder(
    config: RunConfig, plan: Plan, place: Place, start: Attempt, beginning: Beginning, notes: Sequence[str]
) -> Recorder | None:
    """On rank 0, when all is ready for the next step: what the run writes through, after what there is to say first."""
    if not place.first:
        return None
    folder, clock = Path(config.run.folder), beginning.clock
    if clock.samples < clock.total_samples:
        provenance.train_on(folder, config, clock.step, beginning.changes)
    recorder = Recorder(
        folder,
        total_steps=plan.total_steps,
        attempt=start.number,
        step=clock.step,
        config=load.dump(config),
        loggers=config.record.loggers,
    )
    for note in notes:
        recorder.note(note)
    return recorder
