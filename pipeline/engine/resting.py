"""Modules that are not trained for the time being are in eval mode: no dropout, no statistics of batch norm.

A module rests while everything in it is frozen by ``[[optimizer.groups]]``. What an objective holds by itself, such as
a momentum encoder, is the objective's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from pipeline.config.schema import Group
from pipeline.core.protocols import Objective
from pipeline.engine.optimizers import group_of

Span = tuple[int, int | None]
"""Steps, the second not included; None: to the end."""


class Resting:
    """Knows which modules rest in a step.

    Args:
        objective: whose modules they are.
        groups: of ``[[optimizer.groups]]``, those of phases included.
        frozen: steps in which a group is not trained, by its prefix (:class:`pipeline.config.resolve.Plan`).
    """

    def __init__(self, objective: Objective, groups: Sequence[Group], frozen: Mapping[str, tuple[int, int]]) -> None:
        self._objective = objective
        spans: dict[str, Span | None] = {}
        for name, _ in objective.named_parameters():
            group = group_of(name, groups)
            spans[name] = None if group is None else (0, None) if group.frozen else frozen.get(group.prefix)
        self._modules = list(_largest(objective, "", spans)) if any(spans.values()) else []

    def begin(self, step: int) -> None:
        """Before the first forward of a step of a training objective."""
        if any(end == step for _, (_, end) in self._modules):
            self._objective.train()
        for module, (first, end) in self._modules:
            if first <= step and (end is None or step < end):
                module.eval()


def _largest(module: nn.Module, prefix: str, spans: Mapping[str, Span | None]) -> Iterator[tuple[nn.Module, Span]]:
    """The largest modules whose parameters are all frozen at the same times."""
    own = {span for name, span in spans.items() if name.startswith(prefix)}
    if len(own) == 1 and (span := own.pop()) is not None:
        yield module, span
    elif own:
        for name, child in module.named_children():
            yield from _largest(child, f"{prefix}{name}.", spans)
