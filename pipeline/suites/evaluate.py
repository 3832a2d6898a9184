"""A suite of evaluations on a checkpoint, or on the same model untrained."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel
from torch import nn

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED
from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import Component, Image, RunConfig, SuiteConfig
from pipeline.core import registry
from pipeline.core.components import EVALS, check_suite
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import Evaluation, Number
from pipeline.data.evaluation import OrderedStream, open_eval
from pipeline.dist.group import Place, process_group
from pipeline.engine.fragments import MODEL
from pipeline.record.report import write_report
from pipeline.record.results import add_results, rows, table
from pipeline.suites.context import Context
from pipeline.suites.subject import Subject, of_checkpoint, untrained


def evaluate(run: str, suite: str, checkpoint: str | None, random_init: bool, overrides: Sequence[str]) -> int:
    """Run a suite, record its results in the run's folder, renew the report and print the table."""
    plan = load.load_suite(suite, overrides)
    evaluations = [_evaluation(c, own) for c, own in zip(plan.evals, check_suite(plan, suite), strict=True)]
    folder = Path(run)
    with ExitStack() as stack:
        place = stack.enter_context(process_group(timeout_minutes=60))
        subject = untrained(folder, place) if random_init else of_checkpoint(folder, checkpoint, plan.weights, place)
        context = _context(plan, subject, folder, place, stack)
        _check(evaluations, plan, context, suite)
        for component, evaluation in zip(plan.evals, evaluations, strict=True):
            with torch.no_grad():
                results = [output for output in evaluation.run(context) if isinstance(output, Number)]
            if place.first:  # what is measured is kept, whatever comes after
                used = evaluation.uses().streams
                prints = {n: context.streams[n].fingerprint for n in plan.streams if n in used}
                digest = _digest(component, plan, subject.config)
                add_results(
                    folder,
                    rows(
                        results,
                        model=subject.name,
                        step=subject.step,
                        evaluation=component.name,
                        config=digest,
                        manifests=prints,
                    ),
                )
        if place.first:
            table(add_results(folder, ()), sys.stdout)
            write_report(folder)
    return FINISHED


def _evaluation(component: Component, settings: BaseModel) -> Evaluation:
    make = cast("Callable[[BaseModel], Evaluation]", registry.component(EVALS, component.name, Evaluation))
    return make(settings)


def _context(suite: SuiteConfig, subject: Subject, folder: Path, place: Place, stack: ExitStack) -> Context:
    """All that the evaluations of a suite are given."""
    classes = dict.fromkeys(subject.encoders, subject.classes)
    encoders = dict(subject.encoders)
    if suite.judge is not None:
        judge = of_checkpoint(Path(suite.judge), None, MODEL, place)
        encoders |= {f"judge.{name}": encoder for name, encoder in judge.encoders.items()}
        classes |= {f"judge.{name}": judge.classes for name in judge.encoders}
    streams = _open_streams(suite, subject, place, stack)
    tokenize = subject.tokenize if subject.tokenizer is not None else None
    return Context(encoders, classes, streams, place, folder / "evaluations", suite.streams, tokenize)


def _check(evaluations: Sequence[Evaluation], suite: SuiteConfig, context: Context, title: str) -> None:
    """Refuse what cannot be done before anything is computed.

    Raises:
        Mistakes: with those of all evaluations.
    """
    problems: list[str] = []
    for number, (component, evaluation) in enumerate(zip(suite.evals, evaluations, strict=True)):
        missing = [name for name in evaluation.uses().encoders if name not in context.encoders]
        try:
            if missing:
                raise ConfigError(_lacks(component.name, missing[0], context.encoders))
            evaluation.check(context)
        except ConfigError as error:
            problems.append(f"evals[{number}]: {error}")
    if problems:
        raise Mistakes(title, problems)


def _lacks(name: str, encoder: str, encoders: Mapping[str, nn.Module]) -> str:
    if encoder.startswith("judge.") and not any(known.startswith("judge.") for known in encoders):
        return f'evaluation {name!r} needs the encoder {encoder!r}: name the run that judges, judge = "runs/..."'
    return f"evaluation {name!r} needs the encoder {encoder!r}; this objective has {', '.join(encoders) or 'none'}"


def _geometry(suite: SuiteConfig, config: RunConfig) -> Image:
    """The suite's, or centre crops of the size of the run."""
    return suite.image or Image(size=config.data.image.size, crop="center")


def _digest(component: Component, suite: SuiteConfig, config: RunConfig) -> str:
    """Of the settings that decide a number, so that a report can say which numbers may be compared."""
    decides = [component.model_dump(mode="json"), _geometry(suite, config).model_dump(mode="json"), suite.streams]
    decides += [suite.judge] if suite.judge is not None else []
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _open_streams(suite: SuiteConfig, subject: Subject, place: Place, stack: ExitStack) -> dict[str, OrderedStream]:
    """The suite's data sets; texts in them are read as the model was taught to read."""
    config = subject.config
    return {
        name: stack.enter_context(
            closing(
                open_eval(
                    folder,
                    _geometry(suite, config),
                    suite.fields,
                    batch=suite.batch,
                    workers=suite.workers,
                    rank=place.rank,
                    world=place.world_size,
                    captions=config.data.captions,
                    tokenizer=subject.tokenizer,
                )
            )
        )
        for name, folder in suite.streams.items()
    }
