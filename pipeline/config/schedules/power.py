"""(1 + a p)^-b, p from 0 to 1 over the run: Ganin et al., "Domain-Adversarial Training of Neural Networks" (JMLR 2016),
section 5.2.2, with a = 10 and b = 0.75; DAN, CORAL and their successors keep it.
"""

from typing import Annotated

from pydantic import Field

from pipeline.config.schedule import Cooled, Moment


class Config(Cooled):
    """Settings of the power law."""

    a: Annotated[float, Field(ge=0)] = 10.0
    b: Annotated[float, Field(ge=0)] = 0.75

    def part(self, moment: Moment) -> float:
        """The power law; p counts from the end of the warm-up."""
        return (1 + self.a * moment.progress) ** -self.b
