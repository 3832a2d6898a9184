"""Falls as sqrt(w / s) of the samples s from the end of the warm-up w on: Vaswani et al. 2017, section 5.3."""

import math

from pydantic import model_validator

from pipeline.config.schedule import Cooled, Moment


class Config(Cooled):
    """Settings of the inverse square root."""

    @model_validator(mode="after")
    def _warmed(self) -> "Config":
        if self.warmup.value == 0:
            raise ValueError("inverse_sqrt falls from the end of the warm-up and needs one; set warmup")
        return self

    def part(self, moment: Moment) -> float:
        """Of a quarter of the peak after sixteen warm-ups."""
        return math.sqrt(moment.warmup / moment.seen)
