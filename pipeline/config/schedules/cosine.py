"""Half a cosine from the peak to ``final``: Loshchilov and Hutter, "SGDR" (ICLR 2017), equation 5.

final + (1 - final) * (1 + cos(pi * p)) / 2 with p the part of the run after the warm-up that is done.
"""

import math
from typing import Annotated

from pydantic import Field

from pipeline.config.schedule import Moment, Schedule


class Config(Schedule):
    """Settings of the cosine."""

    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Its end, as a part of the peak."""

    def part(self, moment: Moment) -> float:
        """Half a cosine."""
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * moment.progress)) / 2
