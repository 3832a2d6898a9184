"""What a logger is: another program's curves, beside ``metrics.jsonl``, which stays the one thing that is true."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core import registry
from pipeline.core.errors import ConfigError
from pipeline.record.metrics import read_history
from pipeline.record.pictures import Shown
from pipeline.record.showcase import read_pictures

LOGGERS = "pipeline.record.loggers"


@dataclass(frozen=True)
class Begun:
    """What a logger is told when a run begins or goes on."""

    folder: Path
    """Of the run."""
    step: int
    """Updates that are done; what was logged after it is given up."""
    config: str
    """The resolved configuration, as TOML."""

    def scalars(self) -> Iterator[tuple[int, dict[str, float]]]:
        """The lines of the metrics that count, up to the step: each step once, in order."""
        for row in read_history(self.folder).rows:
            if row["step"] <= self.step:
                yield row["step"], numbers({name: row[name] for name in row if name not in ("step", "attempt")})

    def pictures(self) -> dict[int, list[Shown]]:
        """The showcase up to the step."""
        return {step: shown for step, shown in read_pictures(self.folder).items() if step <= self.step}


class Logger(ABC):
    """Shows a run's curves in another program. Only rank 0 has one.

    A program whose files cannot be cut at a step is given a new one at each start, with everything up to the step that
    the run goes on from, and the old one is taken away: so no step is ever there twice, wherever the run was killed.
    The module that holds it imports the program only when it is made, and says in ``PACKAGE`` what has to be installed.
    """

    @abstractmethod
    def __init__(self, begun: Begun) -> None:
        """Open what is written into, and bring it to where the run is."""

    @abstractmethod
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The numbers of a log step; some may not be finite."""

    @abstractmethod
    def picture(self, step: int, shown: Shown) -> None:
        """A picture of the showcase, which lies in the run's folder."""

    @abstractmethod
    def close(self) -> None:
        """Write out and close everything."""


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Without texts, such as digests."""
    return {name: value for name, value in values.items() if not isinstance(value, str)}


def check_loggers(names: Sequence[str]) -> None:
    """Be sure that what loggers need is installed here, without importing it.

    Raises:
        ConfigError: one of them is not; with the way to install it.
    """
    for name in names:
        package: str = registry.module(LOGGERS, name).PACKAGE
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f'record.loggers: "{name}" needs the package {package}, which is not installed here: '
                f"pip install 'sluice[{name}]', or leave it out"
            )


def make_logger(name: str, begun: Begun) -> Logger:
    """The logger of that name."""
    return registry.component(LOGGERS, name, Logger)(begun)  # type: ignore[type-abstract]
