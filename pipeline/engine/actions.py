"""What happens every so often: a visible list, run by the loop after the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.core.protocols import Clock


@dataclass(frozen=True)
class Action:
    """Something done every so many updates, on all ranks together."""

    name: str
    every: int
    """Updates between two runs; 0: never but at the end."""
    run: Callable[[Clock], None]
    at_end: bool = True
    """Also after the last update, when that is not a multiple of ``every``."""

    def due(self, clock: Clock, *, ending: bool) -> bool:
        """Whether to run after the update that ``clock`` counts; ``ending``: it was the last one."""
        if self.every and clock.step % self.every == 0:
            return True
        return ending and self.at_end
