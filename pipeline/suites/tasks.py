"""What a suite is made of: each evaluation on each of its data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

from pydantic import BaseModel

from pipeline.config.schema import EvalData, SuiteConfig
from pipeline.core import registry
from pipeline.core.components import EVALS, check_suite
from pipeline.core.evaluation import Evaluation, Uses


@dataclass(frozen=True)
class Task:
    """An evaluation on a data set."""

    name: str
    """Of the evaluation."""
    settings: BaseModel
    make: Callable[[], Evaluation]
    """A new one, for each subject."""
    data_name: str
    """Of the data set; "": the suite's [streams]."""
    streams: Mapping[str, EvalData]
    """Of the data set, by name."""

    @property
    def uses(self) -> Uses:
        """What it looks at."""
        return self.make().uses()

    @property
    def title(self) -> str:
        """As a person calls it: "knn on cifar10"."""
        return f"{self.name} on {self.data_name}" if self.data_name else self.name


def tasks_of(plan: SuiteConfig, title: str) -> list[Task]:
    """All tasks of a suite, in its order.

    Raises:
        Mistakes: with those of all evaluations.
    """
    found: list[Task] = []
    for component, settings in zip(plan.evals, check_suite(plan, title), strict=True):
        make = cast("Callable[[BaseModel], Evaluation]", registry.component(EVALS, component.name, Evaluation))
        for data_name, streams in plan.sets(component).items():
            found.append(Task(component.name, settings, partial(make, settings), data_name, streams))
    return found
