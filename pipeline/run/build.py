"""From configuration to parts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from typing import cast

import numpy as np
import torch

from pipeline.config.resolve import Plan, period
from pipeline.config.schema import RunConfig, Source
from pipeline.core import registry
from pipeline.core.components import OBJECTIVES, check_component
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.manifest import Manifest
from pipeline.core.protocols import Batch, DataFacts, Objective, Stream
from pipeline.data.stream import open_stream
from pipeline.data.survey import open_survey
from pipeline.data.text import TextDecoder, read_tokenizer
from pipeline.dist.group import Place
from pipeline.engine import asked, optimizers, phases
from pipeline.engine.actions import Action
from pipeline.engine.base import BaseEngine, SingleEngine
from pipeline.engine.checkpoint import Saved
from pipeline.engine.ema import Ema
from pipeline.engine.fragments import MODEL, Spec
from pipeline.engine.phases import PhasedEngine
from pipeline.engine.resting import Resting
from pipeline.engine.surveys import Surveyor

SHOWN = 8
"""Samples in a showcase."""


def build_objective(config: RunConfig, data: DataFacts, title: str) -> Objective:
    """The objective with its initial weights, a function of the run's seed: the same on every rank.

    Args:
        config: the run.
        data: image size and classes.
        title: what the configuration is called in a message.
    """
    settings = check_component(OBJECTIVES, config.objective, title, ("objective",))
    make = cast("Callable[..., Objective]", registry.component(OBJECTIVES, config.objective.name, Objective))
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    objective = make(settings, data)
    for table, optimizer in config.optimizers().items():
        optimizers.freeze(objective, optimizer.groups, title, table)
    return objective


def build_engine(config: RunConfig, objective: Objective, plan: Plan, place: Place) -> BaseEngine:
    """The engine that the configuration names, with its moving averages.

    Raises:
        ConfigError: phases that the objective has not, or that the engine cannot train.
    """
    phases.check(config, objective)
    if objective.second_order and config.engine.name == "deepspeed" and config.engine.zero == 3:
        raise ConfigError(
            f"engine.zero = 3: objective {config.objective.name!r} takes a gradient of its network within its forward, "
            "and ZeRO 3 takes the parameters away as soon as a layer has run. Set engine.zero = 2, where gradients and "
            "optimizer state are still shared out over the ranks"
        )
    if objective.phases():
        updates = {name: phase.updates for name, phase in config.phases.items()}

        def of_phase(name: str) -> SingleEngine:
            own = config.phases[name].optimizer if name in config.phases else None
            asked_for = config.model_copy(update={"optimizer": own or config.optimizer})
            return _named_engine(asked_for, objective, plan, place)

        engine: BaseEngine = PhasedEngine(objective, updates, of_phase, place)
    else:
        engine = _named_engine(config, objective, plan, place)
    groups = [group for optimizer in config.optimizers().values() for group in optimizer.groups]
    engine.resting = Resting(objective, groups, plan.frozen)
    if config.ema is not None:
        engine.ema = Ema(config.ema, engine.slots())
    return engine


def _named_engine(config: RunConfig, objective: Objective, plan: Plan, place: Place) -> SingleEngine:
    """Only the engine that is named is imported; what it has become is held against what was asked for."""
    if config.engine.name == "deepspeed":
        from pipeline.engine.deepspeed import DeepSpeedEngine as Engine
    else:
        from pipeline.engine.accelerate import AccelerateEngine as Engine
    rules = optimizers.rules(objective, config.optimizer, plan.frozen)
    engine = Engine(objective, config.engine, config.optimizer, plan, place)
    asked.hold(engine.built(), objective, config, plan, rules)
    return engine


def build_stream(config: RunConfig, manifest: Manifest, plan: Plan, place: Place) -> Stream:
    """This rank's part of the training stream; its loader processes start in the background."""
    return open_stream(
        config.data,
        manifest,
        seed=config.run.seed,
        global_batch=plan.global_batch,
        micro_batch=plan.micro_batch,
        rank=place.rank,
        world=place.world_size,
        device=place.device,
    )


def build_surveys(
    config: RunConfig, manifest: Manifest, plan: Plan, engine: BaseEngine, surveyor: Surveyor, stack: ExitStack
) -> list[Action]:
    """The surveys of the objective, for the loop's list; their files are closed by ``stack``.

    Raises:
        ConfigError: of a data set that the run has not got.
    """
    place = engine.place
    found: list[Action] = []
    for name, survey in engine.objective.surveys().items():
        samples = open_survey(
            config.data,
            manifest,
            survey.data,
            batch=config.engine.micro_batch,
            seed=config.run.seed,
            rank=place.rank,
            world=place.world_size,
            samples=survey.samples,
        )
        stack.enter_context(closing(samples))
        found.append(surveyor.action(name, period(plan, survey.every), samples))
    return found


def sample_batch(config: RunConfig, manifest: Manifest, count: int = SHOWN) -> Batch:
    """A few samples, the same on every rank and in every attempt: for showcases, and to check what comes."""
    count = min(count, manifest.samples)
    # Of mixed data sets each must have its part in a batch; of a larger one, samples are taken evenly.
    drawn = min(_least_batch(config.data.train, count), max(count, config.run.global_batch))
    data = config.data.model_copy(update={"workers": 0, "lanes": None, "decode": "loader"})
    few = open_stream(data, manifest, seed=config.run.seed, global_batch=drawn, micro_batch=drawn, rank=0, world=1)
    with closing(few):
        batch = next(few.batches(0))[0]
    rows = torch.linspace(0, drawn - 1, count).round().long()
    return {name: value[rows] for name, value in batch.items()}


def _least_batch(train: str | Sequence[Source], count: int) -> int:
    """The smallest batch of at least ``count`` samples that has one of every source."""
    if isinstance(train, str):
        return count
    weights = [source.weight for source in train]
    return max(count, math.ceil(sum(weights) / min(weights)))


def tokenizer_of(config: RunConfig, manifest: Manifest) -> bytes | None:
    """The file of the tokenizer that texts are read with; None: there are no texts."""
    return read_tokenizer(manifest, config.data.captions) if "text" in config.data.fields else None


def text_reader(config: RunConfig, tokenizer: bytes | None) -> Callable[[Batch], list[str]] | None:
    """What turns the field "text" of a batch back into words; None: there is no such field."""
    return None if tokenizer is None else TextDecoder(config.data.captions, tokenizer, config.run.seed).words


def model_specs(saved: Saved) -> dict[str, Spec]:
    """The tensors of the model in a checkpoint."""
    return {name: spec for name, spec in saved.tensors.items() if name.startswith(MODEL + "/")}


def check_model(saved: Saved, expected: dict[str, Spec]) -> None:
    """Hold a checkpoint's model against the one that was built.

    Raises:
        CheckpointError: they differ in a name, a shape or a type.
    """
    stored = model_specs(saved)
    different = sorted(n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{saved.folder} is of another model: {len(different)} tensors differ, first {name} "
            f"(checkpoint: {_say(stored.get(name))}, configuration: {_say(expected.get(name))}); "
            "use the objective of the checkpoint, or start a new run in another folder"
        )


def _say(spec: Spec | None) -> str:
    return "absent" if spec is None else f"{spec.dtype}{list(spec.shape)}"
