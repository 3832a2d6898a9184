"""The tasks of a suite on one subject: each by itself, so that one that fails keeps no other one from its numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import nn

from pipeline.config.schema import SuiteConfig
from pipeline.core.cache import VARIABLE, cache_folder
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Output
from pipeline.data.evaluation import OrderedStream
from pipeline.dist.group import Place, by_first
from pipeline.dist.meeting import Failure, Held, Meeting
from pipeline.record.console import say
from pipeline.record.outputs import found, keep
from pipeline.record.records import About, Record, results_of, whole
from pipeline.record.results import Origin, Results
from pipeline.record.terminal import table_text, whole_text
from pipeline.suites.context import Context
from pipeline.suites.feature_cache import FeatureCache
from pipeline.suites.feature_store import FeatureStore
from pipeline.suites.identity import circumstances, origin_of, streams_named, weights_hash
from pipeline.suites.opened import Streams
from pipeline.suites.progress import Progress, Shown
from pipeline.suites.subject import Subject
from pipeline.suites.tasks import Task
from pipeline.suites.untouched import check_untouched, whole_hash


@dataclass(frozen=True)
class Asked:
    """How a suite is run."""

    suite: str
    """Its name."""
    plan: SuiteConfig
    tasks: Sequence[Task]
    again: bool = False
    """Also what is there already."""
    limit: int | None = None
    """Samples of each stream that are looked at; None: all."""


@dataclass(frozen=True)
class Done:
    """What has come of a task on a subject; the same on every rank, but for the results, which rank 0 has."""

    title: str
    subject: str
    told: str
    """What it is called among those of all folders."""
    folder: Path
    """Of its results."""
    failure: Failure | None = None
    results: Results | None = None
    before: bool = False
    """It was there already."""


@dataclass(frozen=True)
class Measured:
    """What a task gave on this rank."""

    origin: Origin
    about: About
    outputs: Sequence[Output]
    there: Record | None = None
    """What an earlier run of the suite has kept: nothing was measured."""


class Runner:
    """Runs tasks on one subject.

    Args:
        asked: the suite.
        name: of the subject, as it was named.
        subject: what is measured.
        told: what it is called among those of all folders.
        judge: whose encoders judge; None: there is none.
        folder: of the results.
        place: of this rank.
        meeting: of the ranks.
        progress: shows how far the suite is.
    """

    def __init__(
        self,
        asked: Asked,
        name: str,
        subject: Subject,
        told: str,
        judge: Subject | None,
        folder: Path,
        place: Place,
        meeting: Meeting,
        progress: Progress,
    ) -> None:
        self._asked, self._name, self._subject, self._folder = asked, name, subject, folder
        self._place, self._meeting, self._progress = place, meeting, progress
        self._encoders: dict[str, nn.Module] = dict(subject.encoders)
        self._classes = dict.fromkeys(subject.encoders, subject.classes)
        if judge is not None:
            self._encoders |= {f"judge.{name}": encoder for name, encoder in judge.encoders.items()}
            self._classes |= {f"judge.{name}": judge.classes for name in judge.encoders}
        self._streams = Streams(asked.plan, asked.tasks, subject, place, asked.limit, progress.show)
        self._made: dict[str, dict[Hashable, Any]] = {}
        self._stores: dict[str, FeatureStore] = {}
        self._cache = _cache(asked.plan, place)
        self._weights = weights_hash(subject.encoders)
        self._before = whole_hash(self._encoders)
        self.subject, self.told = subject.name, told
        self.touched = False
        """An evaluation has changed the subject: it has to be opened anew."""

    def run(self, task: Task) -> Done:
        """Run a task and keep its record. All ranks call this together."""
        held = self._meeting.hold(partial(self._measure, task))
        if held.value is None or held.failure is not None:
            self._streams.close()  # loader processes may be in the middle of something
            self.touched = not self._untouched()
            self._stores.clear()
            self._made.clear()  # and of what was made, each rank may have another part
            return self._done(task, held.failure)
        measured = held.value
        if measured.there is not None:
            results = results_of(measured.there, self._folder)
            return self._done(task, None, results, before=True)
        kept = self._meeting.hold(partial(self._kept, measured))
        return self._done(task, kept.failure, kept.value)

    def _done(self, task: Task, failure: Failure | None, results: Results | None = None, before: bool = False) -> Done:
        return Done(task.title, self.subject, self.told, self._folder, failure, results, before)

    def forget(self, data_name: str) -> None:
        """No further task looks at a data set: what was made of it may go."""
        self._made.pop(data_name, None)
        self._stores.pop(data_name, None)

    def close(self) -> None:
        """Stop loader processes and release files."""
        self._streams.close()

    def _measure(self, task: Task) -> Measured:
        """On this rank.

        Raises:
            Exception: whatever an evaluation can raise.
        """
        evaluation = task.make()
        if missing := [name for name in evaluation.uses().encoders if name not in self._encoders]:
            raise ConfigError(_lacks(missing[0], self._encoders))
        streams = {name: self._streams.get(task, name) for name in evaluation.uses().streams}
        context = self._context(task, streams)
        image = self._subject.crop(self._asked.plan.image)
        limit = self._asked.limit if any(stream.cut for stream in streams.values()) else None
        origin = origin_of(
            self._subject,
            self._weights,
            task.name,
            evaluation,
            task.settings,
            image,
            context,
            limit,
            self._asked.plan.field,
        )
        context = replace(context, folder=context.folder / origin.name)
        about = self._about(task, circumstances(task.name, self._subject, streams.values()))
        if not self._asked.again and (record := by_first(partial(there, self._folder, origin, about.code, task.title))):
            return Measured(origin, about, [], record)
        evaluation.check(context)
        began = monotonic()
        with torch.no_grad():
            outputs = list(evaluation.run(context))
        check_untouched(self._encoders, self._before)
        return Measured(origin, replace(about, seconds=monotonic() - began), outputs)

    def _untouched(self) -> bool:
        """Whether the subject is on all ranks what it was."""
        held: Held[None] = self._meeting.hold(lambda: check_untouched(self._encoders, self._before))
        return held.failure is None

    def _context(self, task: Task, opened: Mapping[str, OrderedStream]) -> Context:
        show = self._progress.show
        streams = {name: Shown(name, stream, self._place.world_size, show) for name, stream in opened.items()}
        reads = self._subject.tokenizer is not None
        return Context(
            self._encoders,
            self._classes,
            streams,
            self._place,
            self._folder / "evaluations",
            {name: self._streams.shards(task.streams[name]) for name in opened},
            facts={name: stream.facts for name, stream in opened.items()},
            store=self._stores.setdefault(task.data_name, FeatureStore(self._asked.plan.precision, self._cache)),
            tokenize=self._subject.tokenize if reads else None,
            spell=self._subject.words if reads else None,
            show=show,
            kept=self._made.setdefault(task.data_name, {}),
        )

    def _about(self, task: Task, code: str) -> About:
        named = streams_named(task.settings.model_dump(mode="json"), task.uses.streams)
        names = {use: str(task.streams[stream]) for use, stream in named.items()}
        plan = self._asked.plan
        return About(self._name, self._asked.suite, plan.version, task.data_name, names, code=code)

    def _kept(self, measured: Measured) -> Results | None:
        """On rank 0 the record is written; on a disk that takes no more, the results are at least printed.

        Raises:
            DataError: it could not be written.
        """
        if not self._place.first:
            return None
        origin, about, outputs = measured.origin, measured.about, measured.outputs
        try:
            return keep(self._folder, outputs, origin, about)
        except OSError as error:
            new = found(outputs, origin, about)
            say("\n".join([table_text(new.rows), *map(whole_text, new.tables)]))
            lost = f"; lost: {', '.join(figure.metric for figure in new.figures)}" if new.figures else ""
            raise DataError(
                f"cannot write the results into {self._folder} ({error.strerror}); they are printed above{lost}"
            ) from error


def _cache(suite: SuiteConfig, place: Place) -> FeatureCache | None:
    """Where features are kept, if they are."""
    if suite.cache_gb == 0:
        return None
    try:
        folder = by_first(lambda: cache_folder("features"))
    except ConfigError as error:
        if VARIABLE in os.environ:
            raise
        if place.first:  # nobody has asked for it
            print(f"features are not kept: {error}", file=sys.stderr, flush=True)
        return None
    return FeatureCache(folder, int(suite.cache_gb * 1e9))


def there(folder: Path, origin: Origin, code: str, title: str) -> Record | None:
    """What the same code has measured already. What is there and of no use is said."""

    def tell(why: str) -> None:
        print(f"sluice: {title}, {origin.model}: {why}", file=sys.stderr, flush=True)

    try:
        record = whole(folder, origin.name)
    except DataError as error:
        return tell(str(error))
    if record is not None and record.about.code != code:
        return tell(
            f"measured on {record.body['time'][:19]} by other code or with other names of classes, so it is done anew"
        )
    if record is not None and record.origin.model != origin.model:
        tell(f"it has the weights of {record.origin.model}, under whose name its results are")
    return record


def _lacks(encoder: str, encoders: Mapping[str, nn.Module]) -> str:
    if encoder.startswith("judge.") and not any(known.startswith("judge.") for known in encoders):
        return f'it needs the encoder {encoder!r}: name the run that judges, judge = "runs/..."'
    return f"it needs the encoder {encoder!r}; this objective has {', '.join(encoders) or 'none'}"
