"""A suite of evaluations on a checkpoint, or on the same model untrained."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import cast

import torch
from pydantic import BaseModel
from torch import nn

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED
from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import Component, SuiteConfig, Weights
from pipeline.core import registry
from pipeline.core.cache import VARIABLE, cache_folder
from pipeline.core.components import EVALS, check_suite
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import Evaluation, Output
from pipeline.data.evaluation import OrderedStream, open_eval
from pipeline.dist.group import Place, by_first, process_group
from pipeline.record.console import say
from pipeline.record.outputs import found, keep
from pipeline.record.records import FOLDER, About, whole
from pipeline.record.report import write_report
from pipeline.record.results import Origin, Results, read_results, ready
from pipeline.record.terminal import found_text, table_text, whole_text
from pipeline.suites.context import Context
from pipeline.suites.feature_cache import FeatureCache
from pipeline.suites.feature_store import FeatureStore
from pipeline.suites.identity import code_hash, origin_of, streams_named
from pipeline.suites.progress import Progress, Shown
from pipeline.suites.subject import Subject, open_subject
from pipeline.suites.subjects import MODEL, find


def evaluate(
    run: str,
    suite: str,
    checkpoint: str | None,
    random_init: bool,
    overrides: Sequence[str],
    out: str | None = None,
    again: bool = False,
) -> int:
    """Run of a suite what is not there yet, record it, renew the report and print the table.

    Args:
        run: folder of the run.
        suite: file of the suite.
        checkpoint: of the run; None: its newest whole one.
        random_init: measure the same model untrained.
        overrides: of the suite, ``key.path=value``.
        out: folder for results and report; None: the run's.
        again: run also what is there.
    """
    plan = load.load_suite(suite, overrides)
    settings = check_suite(plan, suite)
    evaluations = [_evaluation(c, own) for c, own in zip(plan.evals, settings, strict=True)]
    folder = Path(run)
    target = folder if out is None else Path(out)
    with ExitStack() as stack:
        place = stack.enter_context(process_group(timeout_minutes=60))
        by_first(lambda: ready(target))
        subject = _opened(f"random:{run}" if random_init else checkpoint or run, plan.weights, place)
        if out is not None:
            subject = replace(subject, name=subject.title)
        progress = stack.enter_context(closing(Progress(sys.stderr, quiet=not place.first)))
        context = _context(plan, subject, target, place, stack, progress)
        prepared = _prepare(evaluations, plan, settings, subject, context, suite)
        new = Results([], [], [])
        for number, (origin, own) in enumerate(prepared):
            about = _about(plan, suite, run, settings[number], evaluations[number], origin)
            if not again and by_first(partial(_there, target, origin, about.code)):
                continue
            progress.begin(origin.evaluation, number, len(prepared))
            began = monotonic()
            with torch.no_grad():
                outputs = list(evaluations[number].run(own))
            if place.first:  # what is measured is kept, whatever comes after
                new = new.and_of(_keep(target, outputs, origin, replace(about, seconds=monotonic() - began)))
        if place.first:
            progress.close()
            page = write_report(target)
            say(table_text(read_results(target).rows))
            if more := found_text(target, new):
                say(f"{more}\nshown in {page}")
    return FINISHED


def _opened(spelled: str, weights: Weights, place: Place) -> Subject:
    """What one word names."""
    specs = by_first(lambda: find([spelled], [weights]))
    if len(specs) > 1:
        raise ConfigError(f"{spelled} are {len(specs)}, and one is wanted: {specs[0].name}, {specs[1].name}")
    return open_subject(specs[0], place)


def _there(folder: Path, origin: Origin, code: str) -> bool:
    """Whether the same code has measured this already; what is there is said, and so is what is there and damaged."""
    try:
        record = whole(folder, origin.name)
    except DataError as error:
        say(f"{origin.evaluation}: {error}")
        return False
    if record is None:
        return False
    when = str(record.body["time"])[:19]
    if record.about.code != code:
        say(f"{origin.evaluation}: measured on {when} by other code, and so measured anew")
        return False
    say(f"{origin.evaluation}: measured on {when}, see {FOLDER}/{origin.name}.json; --again measures it anew")
    return True


def _about(
    plan: SuiteConfig, suite: str, run: str, settings: BaseModel, evaluation: Evaluation, origin: Origin
) -> About:
    """What is told of a record beside its origin."""
    named = streams_named(settings.model_dump(mode="json"), evaluation.uses().streams)
    names = {use: plan.streams[stream] for use, stream in named.items()}
    return About(run, Path(suite).stem, data_names=names, code=code_hash(origin.evaluation))


def _keep(folder: Path, outputs: Sequence[Output], origin: Origin, about: About) -> Results:
    """Write the record; on a disk that takes no more, the results are at least printed.

    Raises:
        DataError: it could not be written.
    """
    try:
        return keep(folder, outputs, origin, about)
    except OSError as error:
        new = found(outputs, origin, about)
        say("\n".join([table_text(new.rows), *map(whole_text, new.tables)]))
        lost = f"; lost: {', '.join(figure.metric for figure in new.figures)}" if new.figures else ""
        raise DataError(
            f"cannot write the results into {folder} ({error.strerror}); they are printed above{lost}"
        ) from error


def _evaluation(component: Component, settings: BaseModel) -> Evaluation:
    make = cast("Callable[[BaseModel], Evaluation]", registry.component(EVALS, component.name, Evaluation))
    return make(settings)


def _context(
    suite: SuiteConfig, subject: Subject, folder: Path, place: Place, stack: ExitStack, progress: Progress
) -> Context:
    """All that the evaluations of a suite are given."""
    classes = dict.fromkeys(subject.encoders, subject.classes)
    encoders = dict(subject.encoders)
    if suite.judge is not None:
        judge = _opened(suite.judge, MODEL, place)
        encoders |= {f"judge.{name}": encoder for name, encoder in judge.encoders.items()}
        classes |= {f"judge.{name}": judge.classes for name in judge.encoders}
    opened = _open_streams(suite, subject, place, stack)
    streams = {name: Shown(name, stream, place.world_size, progress.show) for name, stream in opened.items()}
    tokenize, spell = (subject.tokenize, subject.words) if subject.tokenizer is not None else (None, None)
    kept = folder / "evaluations"
    facts = {name: stream.facts for name, stream in opened.items()}
    store = FeatureStore(suite.precision, _cache(suite, place))
    return Context(encoders, classes, streams, place, kept, suite.streams, facts, store, tokenize, spell, progress.show)


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


def _prepare(
    evaluations: Sequence[Evaluation],
    suite: SuiteConfig,
    settings: Sequence[BaseModel],
    subject: Subject,
    context: Context,
    title: str,
) -> list[tuple[Origin, Context]]:
    """Origin and context of each evaluation, with a folder of its own; what cannot be done is refused.

    Raises:
        Mistakes: with those of all evaluations.
    """
    problems: dict[int, str] = {}
    origins: dict[int, Origin] = {}
    for number, (component, evaluation) in enumerate(zip(suite.evals, evaluations, strict=True)):
        if missing := [name for name in evaluation.uses().encoders if name not in context.encoders]:
            problems[number] = _lacks(component.name, missing[0], context.encoders)
        else:
            geometry = subject.crop(suite.image)
            origins[number] = origin_of(subject, component.name, evaluation, settings[number], geometry, context)
    prepared: list[tuple[Origin, Context]] = []
    for number, origin in origins.items():
        own = replace(context, folder=context.folder / origin.name)
        prepared.append((origin, own))
        try:
            evaluations[number].check(own)
        except ConfigError as error:
            problems[number] = str(error)
    if problems:
        raise Mistakes(title, [f"evals[{number}]: {problems[number]}" for number in sorted(problems)])
    return prepared


def _lacks(name: str, encoder: str, encoders: Mapping[str, nn.Module]) -> str:
    if encoder.startswith("judge.") and not any(known.startswith("judge.") for known in encoders):
        return f'evaluation {name!r} needs the encoder {encoder!r}: name the run that judges, judge = "runs/..."'
    return f"evaluation {name!r} needs the encoder {encoder!r}; this objective has {', '.join(encoders) or 'none'}"


def _open_streams(suite: SuiteConfig, subject: Subject, place: Place, stack: ExitStack) -> dict[str, OrderedStream]:
    """The suite's data sets; texts in them are read as the model was taught to read."""
    image = subject.crop(suite.image)
    return {
        name: stack.enter_context(
            closing(
                open_eval(
                    folder,
                    image,
                    suite.fields,
                    batch=suite.batch,
                    workers=suite.workers,
                    rank=place.rank,
                    world=place.world_size,
                    captions=subject.captions,
                    tokenizer=subject.tokenizer,
                )
            )
        )
        for name, folder in suite.streams.items()
    }
