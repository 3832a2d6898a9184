"""The second phase of reading a configuration: the settings of components, by the components' own ``Config``.

Importing a component imports torch, so this is done where the run will be, and not on a login node.
"""

from __future__ import annotations

from pydantic import BaseModel

from pipeline.config.mistakes import Mistakes, Path, path_text, validate
from pipeline.config.schema import Component, RunConfig, SuiteConfig
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


def check_suite(config: SuiteConfig, title: str) -> None:
    """Check the settings of all evaluations of a suite.

    Raises:
        Mistakes: with those of all components.
    """
    problems: list[str] = []
    for place, component in enumerate(config.evals):
        try:
            check_component(EVALS, component, title, ("evals", place))
        except Mistakes as mistakes:
            problems += mistakes.problems
    if problems:
        raise Mistakes(title, problems)
