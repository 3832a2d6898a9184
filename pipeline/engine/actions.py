"""What happens every so often: a visible list, run by the loop after the update, or ahead of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from pipeline.core.protocols import Clock


@dataclass(frozen=True)
class Action:
    """Something done every so many updates, on all ranks together."""

    name: str
    every: int | Fraction
    """Updates between two runs, rounded up where it is not a whole number; 0: never but at the end."""
    run: Callable[[Clock], None]
    at_end: bool = True
    """Also after the last update, when it is not due by then."""
    ahead: bool = False
    """Before the update that follows, so that a run that is killed in it does it again; first before the first one."""

    def due(self, clock: Clock, *, ending: bool) -> bool:
        """Whether to run when ``clock.step`` updates are done; ``ending``: the run ends with them."""
        if self.every and math.ceil(clock.step // self.every * self.every) == clock.step:
            return True
        return ending and self.at_end
