"""What ran is what was asked: an engine, once built, is read back and held against the plan.

Libraries put other optimizers in place of those that they are given (DeepSpeed, for its own Adam and under offloading),
take settings from the environment (Accelerate), or round them. None of it shows in a curve.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from pipeline.config.resolve import Plan
from pipeline.config.schema import EngineConfig, RunConfig
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.errors import LaunchError
from pipeline.core.protocols import Objective
from pipeline.engine import optimizers

KINDS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "lars": optimizers.LARS}
OWN = {"adamw": ("betas", "eps"), "sgd": ("momentum",), "lars": ("momentum",)}
"""Settings of an optimizer that are the same for all of its groups."""


class Built(NamedTuple):
    """An engine as its library describes it."""

    library: str
    """With its version."""
    optimizer: torch.optim.Optimizer
    """The one that is stepped."""
    groups: Mapping[str, int]
    """Number of a parameter's group in it, for those of which this rank holds a part."""
    settings: Mapping[str, Any]
    """By the name that a person gives them; those of :func:`_asked` are compared."""


def hold(
    built: Built, objective: Objective, config: RunConfig, plan: Plan, rules: Mapping[str, optimizers.Rule]
) -> None:
    """Compare an engine with what was asked for.

    Args:
        built: read back.
        objective: what is trained.
        config: what is asked for.
        plan: the same in numbers.
        rules: of all trained parameters, from before the engine was built (ZeRO 3 takes the shapes away).

    Raises:
        LaunchError: with every difference, what was asked for and what there is.
    """
    found = list(_differences(built, objective, config, plan, rules))
    if found:
        raise LaunchError(
            f"{built.library} would not train as the configuration says: {'; '.join(found)}. Nothing was trained; look "
            "for its settings in the environment and for another version of it"
        )


def _differences(
    built: Built, objective: Objective, config: RunConfig, plan: Plan, rules: Mapping[str, optimizers.Rule]
) -> Iterator[str]:
    optimizer = config.optimizer
    kind = KINDS[optimizer.name]
    if type(built.optimizer) is not kind:
        yield f"optimizer: {_full_name(kind)} is asked for, {_full_name(type(built.optimizer))} is there"
    types = {str(p.dtype).removeprefix("torch.") for p in objective.parameters() if p.requires_grad}
    if types != {"float32"}:
        yield f"weights: float32 is asked for, {', '.join(sorted(types))} is there"
    asked = _asked(config.engine, optimizer, plan)
    for name, value in asked.items():
        if built.settings[name] != value:
            yield f"{name}: {value} is asked for, {built.settings[name]} is there"
    own = {name: getattr(optimizer, name) for name in OWN[optimizer.name]}
    for name, rule in rules.items():
        if name in built.groups:
            group = built.optimizer.param_groups[built.groups[name]]
            for setting, value in (rule._asdict() | own).items():
                there = group.get(setting)
                if there != value:
                    yield f"{setting} of {name}: {value} is asked for, {there} is there"
                    return  # the others will be no better


def _asked(engine: EngineConfig, optimizer: OptimizerConfig, plan: Plan) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "precision": engine.precision,
        "accumulation": plan.accumulation,
        "parallelism": f"ZeRO {engine.zero}" if engine.name == "deepspeed" else "none",
        "compiler": "none",
    }
    if engine.name == "deepspeed":
        asked |= {"micro-batch": plan.micro_batch, "global batch": plan.global_batch}
        if engine.zero > 0:  # else we clip ourselves
            asked["clip"] = optimizer.clip or 0.0
    return asked


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
