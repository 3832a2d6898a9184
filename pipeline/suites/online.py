"""Evaluation of a run while it trains. It changes no bit of the run.

What is measured is a model of its own, built anew and filled with the weights of the moment, under random numbers and
in a process group that the training does not see. So nothing is left of it: no hook, no mode, no statistic, and not
even a failure in the middle of a collective.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from pipeline.config import load
from pipeline.config.schema import RunConfig, SuiteConfig, Weights
from pipeline.core.components import check_online
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import DataFacts
from pipeline.dist.group import Place, by_first
from pipeline.dist.meeting import MeetingApart
from pipeline.engine.base import BaseEngine
from pipeline.engine.fragments import named_tensors
from pipeline.record.failed import Ended, keep_failures
from pipeline.record.results import Row, ready
from pipeline.suites.progress import Progress
from pipeline.suites.running import Asked, Done, Runner
from pipeline.suites.subject import Subject, built, of_training
from pipeline.suites.subjects import Spec
from pipeline.suites.tasks import tasks_of


class Quality(NamedTuple):
    """What an evaluation of the run has given, on rank 0; on the others nothing."""

    rows: list[Row]
    problems: list[str]
    """What has failed, and why."""


def check_held_out(config: RunConfig, suite: SuiteConfig) -> None:
    """What a suite holds out of the run's own data, the run must leave out.

    Raises:
        ConfigError: it would be trained on.
    """
    train = config.data.train
    sources = [(train, config.data.held_out)] if isinstance(train, str) else [(s.path, s.held_out) for s in train]
    sets = {"": suite.streams, **suite.data}
    for name, stream in ((name, stream) for streams in sets.values() for name, stream in streams.items()):
        out = stream.held_out
        if out is None or out.part == "rest":
            continue
        for path, own in sources:
            rest = own is not None and own.part == "rest" and own.seed == out.seed and own.share >= out.share
            if os.path.normpath(path) == os.path.normpath(stream.path) and not rest:
                raise ConfigError(
                    f"online.suite: stream {name!r} is held out of {path} ({out}), and the run would train on it; set "
                    f'data.held_out = {{part = "rest", share = {out.share}, seed = {out.seed}}}'
                )


class Online:
    """The suite of a run's ``[online]``.

    Args:
        config: of the run.
        facts: of its data.
        tokenizer: the file that its texts are read with; None: it has none.
        place: of this rank.

    Raises:
        ConfigError: of the suite.
    """

    def __init__(self, config: RunConfig, facts: DataFacts, tokenizer: bytes | None, place: Place) -> None:
        assert config.online is not None
        plan = load.load_suite(config.online.suite)
        check_online(plan, config.online.suite)
        self._asked = Asked(Path(config.online.suite).stem, plan, tasks_of(plan, config.online.suite))
        check_held_out(config, plan)
        self._config, self._facts, self._tokenizer, self._place = config, facts, tokenizer, place
        self._folder = Path(config.run.folder)
        averaged = config.ema is not None and config.ema.decay is not None
        self._weights: Weights = config.online.weights or ("ema" if averaged else "model")
        by_first(partial(ready, self._folder))

    def evaluate(self, engine: BaseEngine, step: int, alive: Callable[[], None]) -> Quality:
        """Run of the suite what is not there yet; on all ranks together.

        Args:
            engine: that trains.
            step: updates done.
            alive: called now and then.
        """
        with _as_it_was(self._place), MeetingApart(self._place) as meeting:
            subject = self._subject(engine, step)
            done = self._run(subject, f"{self._folder}@{step}", meeting, _Beating(len(self._asked.tasks), alive))
            by_first(partial(_keep, self._folder, done))
        if not self._place.first:
            return Quality([], [])
        rows = [row for one in done if one.results is not None for row in one.results.rows]
        return Quality(rows, [f"{one.title}: {one.failure.text}" for one in done if one.failure is not None])

    def _run(self, subject: Subject, spelled: str, meeting: MeetingApart, progress: Progress) -> list[Done]:
        name = subject.name
        made = meeting.hold(
            lambda: Runner(self._asked, spelled, subject, name, None, self._folder, self._place, meeting, progress)
        )
        if made.value is None:
            return [Done(task.title, name, name, self._folder, made.failure) for task in self._asked.tasks]
        done: list[Done] = []
        with closing(made.value) as runner:
            for task in self._asked.tasks:
                done.append(runner.run(task))
                if runner.touched:  # an evaluation that changes what it measures: the rest would measure something else
                    break
        return done

    def _subject(self, engine: BaseEngine, step: int) -> Subject:
        """A model of its own with the weights of the moment, as the checkpoint of this step gives it."""
        objective = built(self._config, self._facts, self._folder)
        own = named_tensors(objective)
        averaged = engine.averaged() if self._weights == "ema" else nullcontext()
        with torch.no_grad(), averaged, engine.whole_parameters():
            for name, tensor in named_tensors(engine.objective).items():
                own[name].copy_(tensor)
        spec = Spec(str(self._folder), "checkpoint", self._folder, weights=self._weights, step=step)
        return of_training(spec, objective, self._facts, self._config, self._tokenizer, self._place)


class _Beating(Progress):
    """Shows nothing, and tells that the rank is alive."""

    def __init__(self, total: int, alive: Callable[[], None]) -> None:
        super().__init__(sys.stderr, total, quiet=True)
        self._alive = alive

    def show(self, what: str, done: int, total: int) -> None:
        """A sign of life."""
        self._alive()


def _keep(folder: Path, done: list[Done]) -> None:
    keep_failures(folder, [Ended(d.title, d.subject, d.failure.text if d.failure else None) for d in done])


@contextmanager
def _as_it_was(place: Place) -> Iterator[None]:
    """Inside, random numbers are another's; after it, they go on as if nothing had been drawn."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    device = torch.cuda.get_rng_state(place.device) if place.device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device is not None:
            torch.cuda.set_rng_state(device, place.device)
