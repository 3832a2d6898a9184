"""The learning rate against samples: ``schedules/NAME.py`` holds a docstring naming the source, and ``Config``.

A schedule is its settings and one method. No torch here, so that a plan can be made on a login node.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from pipeline.config import mistakes
from pipeline.config.durations import Duration
from pipeline.config.schema import Strict
from pipeline.core import registry
from pipeline.core.errors import ConfigError

SCHEDULES = "pipeline.config.schedules"
NONE = Duration(0.0, "%")


class Moment(NamedTuple):
    """Where a run is, in samples."""

    seen: float
    warmup: float
    """Samples of the warm-up, which is over."""
    total: float

    @property
    def progress(self) -> float:
        """The part of what follows the warm-up that is done, 0 to 1."""
        rest = self.total - self.warmup
        return min(1.0, (self.seen - self.warmup) / rest) if rest > 0 else 1.0


class Schedule(Strict):
    """The learning rate as a part of its peak."""

    warmup: Duration = NONE
    """Linear from zero; nothing: none."""

    @property
    def name(self) -> str:
        """Of its file."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @abstractmethod
    def part(self, moment: Moment) -> float:
        """The part of the peak after the warm-up, before the cool-down."""


class Cooled(Schedule):
    """A schedule that need not end low by itself."""

    cooldown: Duration = NONE
    """Linear to zero over the end of the run (Zhai et al. 2022, section 3.5); nothing: none."""


def schedule(table: Mapping[str, Any], title: str, origin: mistakes.Origin = mistakes.nowhere) -> Schedule:
    """The schedule that a table ``[schedule]`` describes.

    Args:
        table: name and settings, as TOML gives them.
        title: what the configuration is called in a message.
        origin: names the file that a key was written in, where that is not ``title``.

    Raises:
        Mistakes: no such schedule, or settings that it does not have.
    """
    settings = dict(table)
    name = settings.pop("name", "cosine")
    try:
        module = registry.module(SCHEDULES, name)
    except ConfigError as error:
        raise mistakes.Mistakes(title, [f"schedule.name: {error}"]) from error
    return mistakes.validate(module.Config, settings, title, ("schedule",), origin)
