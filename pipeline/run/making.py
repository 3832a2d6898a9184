"""What trains: an objective with the weights that it begins with, in its engine."""

from __future__ import annotations

from contextlib import nullcontext

from pipeline.config import provenance
from pipeline.config.resolve import Plan
from pipeline.config.schema import RunConfig
from pipeline.core.contract import check_batch
from pipeline.core.protocols import Batch, DataFacts
from pipeline.dist.group import Place
from pipeline.engine.base import BaseEngine
from pipeline.engine.checkpoint import Saved
from pipeline.nn.weights import no_initial_weights
from pipeline.run import frozen
from pipeline.run import start as beginnings
from pipeline.run.build import build_engine, build_objective


def make_engine(
    path: str,
    config: RunConfig,
    known: DataFacts,
    plan: Plan,
    place: Place,
    saved: Saved | None,
    sample: Batch,
    tokenizer: bytes | None,
    notes: list[str],
) -> tuple[BaseEngine, frozen.Origins]:
    """What trains, with its first weights; where a checkpoint is there, files that these came from are not needed.

    Those of frozen parts are, and are returned.
    """
    with no_initial_weights() if saved is not None else nullcontext():
        objective = build_objective(config, known, path)
    check_batch(objective.needs, sample, config.objective.name)
    origins = frozen.fill(objective)
    if saved is not None:
        frozen.check(saved, origins)
    elif config.start is not None:
        report = beginnings.begin(objective, config, known.classes, tokenizer, place)
        notes += beginnings.lines(report)
        if place.first:
            provenance.started(config.run.folder, report)
    return build_engine(config, objective, plan, place), origins
