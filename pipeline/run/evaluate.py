"""A suite of evaluations on a checkpoint, or on the same model untrained."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import cast

import torch
from pydantic import BaseModel
from torch import nn

from pipeline.config import load
from pipeline.config.exitcodes import FINISHED
from pipeline.config.schema import Component, Image, RunConfig, SuiteConfig
from pipeline.core import registry
from pipeline.core.components import EVALS, check_component
from pipeline.core.errors import ConfigError
from pipeline.core.manifest import load as load_manifest
from pipeline.core.protocols import DataFacts, Evaluation, Result
from pipeline.data.evaluation import OrderedStream, open_eval
from pipeline.dist.group import Place, process_group
from pipeline.engine.checkpoint import Saved
from pipeline.engine.fragments import MODEL
from pipeline.evals._features import remembering
from pipeline.record.report import write_report
from pipeline.record.results import add_results, rows, table
from pipeline.run.build import build_objective
from pipeline.run.weights import restore

RANDOM = "random init"


def evaluate(run: str, suite: str, checkpoint: str | None, random_init: bool, overrides: Sequence[str]) -> int:
    """Run a suite, record its results in the run's folder, renew the report and print the table."""
    plan = load.load_suite(suite, overrides)
    with ExitStack() as stack:
        place = stack.enter_context(process_group(timeout_minutes=60))
        folder = Path(run)
        config = load.load_run(folder / "config.toml")
        if random_init:
            manifest = load_manifest(config.data.train)
            facts = DataFacts(config.data.image.shape, manifest.classes)
            objective, model = build_objective(config, facts, run), (RANDOM, None)
        else:
            objective, config, _, saved = restore(folder, checkpoint, place, plan.weights)
            averaged = "" if plan.weights == MODEL else f", {plan.weights}"
            model = (f"step {saved.step}{averaged}", saved.step)
        objective.to(place.device).eval().requires_grad_(False)
        encoders = objective.encoders() | _judges(plan, place)
        settings = [check_component(EVALS, c, suite, ("evals", n)) for n, c in enumerate(plan.evals)]
        streams = _open_streams(plan, config, place, stack)
        if not random_init:
            _check_tokenizer(streams, saved)
        stack.enter_context(remembering())
        for component, own in zip(plan.evals, settings, strict=True):
            results = _run_one(component, own, encoders, streams)
            if place.first:  # what is measured is kept, whatever comes after
                name, step = model
                prints, digest = {n: s.fingerprint for n, s in streams.items()}, _digest(component, plan, config)
                add_results(
                    folder,
                    rows(results, model=name, step=step, evaluation=component.name, config=digest, manifests=prints),
                )
        if place.first:
            table(add_results(folder, ()), sys.stdout)
            write_report(folder)
    return FINISHED


def _judges(suite: SuiteConfig, place: Place) -> dict[str, nn.Module]:
    """The encoders of the run that judges, under "judge.NAME"."""
    if suite.judge is None:
        return {}
    objective = restore(Path(suite.judge), None, place).objective
    objective.to(place.device).eval().requires_grad_(False)
    return {f"judge.{name}": encoder for name, encoder in objective.encoders().items()}


def _geometry(suite: SuiteConfig, config: RunConfig) -> Image:
    """The suite's, or centre crops of the size of the run."""
    return suite.image or Image(size=config.data.image.size, crop="center")


def _digest(component: Component, suite: SuiteConfig, config: RunConfig) -> str:
    """Of the settings that decide a number, so that a report can say which numbers may be compared."""
    decides = [component.model_dump(mode="json"), _geometry(suite, config).model_dump(mode="json"), suite.streams]
    decides += [suite.judge] if suite.judge is not None else []
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]


def _open_streams(suite: SuiteConfig, config: RunConfig, place: Place, stack: ExitStack) -> dict[str, OrderedStream]:
    """The suite's data sets."""
    image = _geometry(suite, config)
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
                    captions=config.data.captions,
                )
            )
        )
        for name, folder in suite.streams.items()
    }


def _check_tokenizer(streams: dict[str, OrderedStream], saved: Saved) -> None:
    """Hold the tokenizer of texts against the one that the model was trained with.

    Raises:
        ConfigError: it is another.
    """
    trained = saved.state["stream"].get("tokenizer")
    for name, stream in streams.items():
        if trained and stream.tokenizer not in (None, trained):
            raise ConfigError(
                f"streams.{name}: its texts are tokenized by another tokenizer ({stream.tokenizer[:12]}) than the "
                f"checkpoint's ({trained[:12]}); name that one's tokenizer.json in the run's data.captions.tokenizer"
            )


def _run_one(
    component: Component, settings: BaseModel, encoders: dict[str, nn.Module], streams: dict[str, OrderedStream]
) -> list[Result]:
    """Run one evaluation, on all ranks.

    Raises:
        ConfigError: the objective has not the encoders that the evaluation uses.
    """
    make = cast("Callable[[BaseModel], Evaluation]", registry.component(EVALS, component.name, Evaluation))
    evaluation = make(settings)
    missing = [n for n in evaluation.needs if n not in encoders]
    if missing:
        raise ConfigError(
            f"evaluation {component.name!r} needs the encoder {missing[0]!r}; this objective has "
            f"{', '.join(encoders) or 'none'}"
        )
    with torch.no_grad():
        return list(evaluation.run(encoders, streams))
