"""The second phase of reading a configuration: the settings of components, by the components' own ``Config``.

Importing a component imports torch, so this is done where the run will be, and not on a login node.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, cast

from pydantic import BaseModel

from pipeline.config.mistakes import Mistakes, Path, path_text, validate
from pipeline.config.schema import Component, EvalTask, RunConfig, SuiteConfig
from pipeline.core import registry
from pipeline.core.errors import ConfigError

OBJECTIVES = "pipeline.objectives"
EVALS = "pipeline.evals"


def check_component(package: str, component: Component, title: str, where: Path) -> BaseModel:
    """The component's own ``Config``, from its settings.

    Args:
        package: "pipeline.objectives" or "pipeline.evals".
        component: name and settings.
        title: what the configuration is called in a message.
        where: where the settings lie in that configuration, ``("objective",)``.

    Raises:
        Mistakes: no such component, or settings that its ``Config`` does not allow.
    """
    try:
        module = registry.module(package, component.name)
    except ConfigError as error:
        raise Mistakes(title, [f"{path_text((*where, 'name'))}{error}"]) from error
    return validate(module.Config, component.settings, title, where)


def check_run(config: RunConfig, title: str) -> None:
    """Check the settings of the run's objective.

    Raises:
        Mistakes: with all of them.
    """
    check_component(OBJECTIVES, config.objective, title, ("objective",))


def check_suite(config: SuiteConfig, title: str) -> list[BaseModel]:
    """The settings of all evaluations of a suite, held against its streams and fields.

    Raises:
        Mistakes: with those of all components.
    """
    problems: list[str] = []
    settings: list[BaseModel] = []
    for place, component in enumerate(config.evals):
        try:
            settings.append(check_component(EVALS, component, title, ("evals", place)))
        except Mistakes as mistakes:
            problems += mistakes.problems
        else:
            where = path_text(("evals", place))
            problems += [where + problem for problem in _stream_problems(config, component, settings[-1])]
    if problems:
        raise Mistakes(title, problems)
    return settings


def check_online(config: SuiteConfig, title: str) -> list[BaseModel]:
    """As :func:`check_suite`, for a suite that is run within a training.

    Raises:
        Mistakes: also of evaluations that train, which the libraries of a run allow once in a process.
    """
    settings = check_suite(config, title)
    interface = importlib.import_module("pipeline.core.evaluation").Evaluation
    problems = [
        f"{path_text(('evals', place))}{component.name} trains a model of its own, which cannot be done within a run; "
        "leave it out of online.suite, and measure checkpoints: `sluice eval --watch RUN SUITE`"
        for place, component in enumerate(config.evals)
        if registry.component(EVALS, component.name, cast("type[Any]", interface)).trains
    ]
    if problems:
        raise Mistakes(title, problems)
    return settings


def _stream_problems(config: SuiteConfig, component: EvalTask, settings: BaseModel) -> Iterator[str]:
    """What an evaluation looks at and the suite has not got."""
    interface = importlib.import_module("pipeline.core.evaluation").Evaluation  # torch is here with the component
    make = registry.component(EVALS, component.name, cast("type[Any]", interface))
    uses = make(settings).uses()
    if config.judge is None and any(name.startswith("judge.") for name in uses.encoders):
        yield f'{component.name} needs a model that judges, and the suite names none; add judge = "runs/..."'
    for name, fields in uses.streams.items():
        for data, streams in config.sets(component).items():
            if name not in streams:
                where = f"[data.{data}]" if data else "the suite"
                known = registry.suggest(name, sorted(streams))
                yield f"{component.name} looks at the stream {name!r}, and {where} has none; {known}"
        for field in fields:
            if field not in config.fields:
                yield f'{component.name} needs the field "{field}" of stream {name!r}; add it to the suite\'s fields'
