"""Objectives whose step is several updates, each with an optimizer of its own: generator and critic, for example.

There is one inner engine per phase over the same modules. While a phase is trained, the parameters of the others
require no gradient, so its loss may run through them at no cost, and nothing of it is left in theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from typing_extensions import override

from pipeline.config.schema import RunConfig
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Clock, Objective
from pipeline.core.registry import suggest
from pipeline.dist.group import Place
from pipeline.engine.base import BaseEngine, SingleEngine, Turn
from pipeline.engine.fragments import Fragment, Slot, Spec


def members(objective: Objective) -> dict[str, list[nn.Parameter]]:
    """The trained parameters of each phase.

    Raises:
        ConfigError: one belongs to no phase or to two, or a phase has none.
    """
    phases = objective.phases()
    found: dict[str, list[nn.Parameter]] = {phase: [] for phase in phases}
    for name, parameter in objective.named_parameters():
        if not parameter.requires_grad:
            continue
        owners = [phase for phase, prefixes in phases.items() if name.startswith(tuple(prefixes))]
        if len(owners) != 1:
            where = "to both " + " and ".join(owners) if owners else f"to none of {', '.join(phases)}"
            raise ConfigError(f"every trained parameter belongs to one phase of the objective, but {name} {where}")
        found[owners[0]].append(parameter)
    for phase, parameters in found.items():
        if not parameters:
            raise ConfigError(f"phase {phase!r} of the objective trains nothing: no parameter begins with its prefixes")
    return found


def check(config: RunConfig, objective: Objective) -> None:
    """Hold what is configured against the phases of the objective.

    Raises:
        ConfigError: unknown phases; an engine that cannot do it.
    """
    known = list(objective.phases())
    for name in config.phases:
        if not known:
            raise ConfigError(f"phases.{name}: objective {config.objective.name!r} has no phases; remove [phases]")
        if name not in known:
            raise ConfigError(f"phases.{name}: no such phase of {config.objective.name!r}; {suggest(name, known)}")
    if known and config.engine.name == "deepspeed" and config.engine.zero == 3:
        raise ConfigError(
            f"engine.zero = 3: objective {config.objective.name!r} makes several updates per step "
            f"({', '.join(known)}), each by a DeepSpeed engine of its own over the same modules; under ZeRO 3 each of "
            "them would cut up and gather the others' parameters. Set engine.zero = 2, where gradients and optimizer "
            "state are still shared out over the ranks"
        )


@contextmanager
def alone(chosen: Iterable[nn.Parameter], everyone: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, of ``everyone`` only the ``chosen`` require a gradient."""
    everyone = list(everyone)
    for parameter in everyone:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in everyone:
            parameter.requires_grad_(True)


class _Phase(NamedTuple):
    name: str
    updates: int
    parameters: list[nn.Parameter]
    engine: SingleEngine


class PhasedEngine(BaseEngine):
    """One engine per phase.

    Args:
        objective: with phases.
        updates: in a step, of phases that make more than one.
        make: builds the engine of a phase, over the parameters that require a gradient.
        place: of this rank.
    """

    def __init__(
        self, objective: Objective, updates: Mapping[str, int], make: Callable[[str], SingleEngine], place: Place
    ) -> None:
        self.objective, self.place = objective, place
        parts = members(objective)
        self._everyone = [parameter for parameters in parts.values() for parameter in parameters]
        self._phases: list[_Phase] = []
        for name, parameters in parts.items():
            with alone(parameters, self._everyone):
                self._phases.append(_Phase(name, updates.get(name, 1), parameters, make(name)))
        first = self._phases[0].engine
        self.replicated, self.precision = first.replicated, first.precision

    @override
    def turns(self) -> Iterator[Turn]:
        for name, updates, parameters, engine in self._phases:
            for repeat in range(updates):
                with alone(parameters, self._everyone):
                    yield Turn(name, repeat, engine)
                with torch.no_grad():  # the next update sees parameters within their limits
                    self.hold(self.objective.limits())

    @override
    def begin_step(self, clock: Clock) -> None:
        for phase in self._phases:
            phase.engine.begin_step(clock)

    @override
    def slots(self) -> list[Slot]:
        return [slot for phase in self._phases for slot in phase.engine.slots()]

    @override
    def trained(self, *, writing: bool) -> Iterator[Fragment]:
        for phase in self._phases:
            yield from phase.engine.trained(writing=writing)

    @override
    def make_state(self, specs: dict[str, Spec]) -> None:
        for phase in self._phases:
            phase.engine.make_state(specs)

    @override
    def publish(self) -> None:
        for phase in self._phases:
            phase.engine.publish()
