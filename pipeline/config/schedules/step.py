"""The peak, times ``factor`` after each milestone: as He et al. train residual networks (CVPR 2016, section 3.4).

``milestones = [0.3, 0.6, 0.9]`` of 100 epochs are those of torchvision and of most distillation on ImageNet;
``[0.625, 0.75, 0.875]`` of 240 epochs (150, 180 and 210) those of RepDistiller on CIFAR-100.
"""

from typing import Annotated

from pydantic import Field, field_validator

from pipeline.config.schedule import Cooled, Moment

Part = Annotated[float, Field(gt=0, lt=1)]


class Config(Cooled):
    """Settings of the steps."""

    milestones: Annotated[tuple[Part, ...], Field(min_length=1)]
    """Parts of the whole run, warm-up included, each after the one before."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @field_validator("milestones")
    @classmethod
    def _rise(cls, milestones: tuple[float, ...]) -> tuple[float, ...]:
        if list(milestones) != sorted(set(milestones)):
            raise ValueError("each milestone comes after the one before: [0.3, 0.6, 0.9]")
        return milestones

    def part(self, moment: Moment) -> float:
        """The factor, as often as milestones are passed."""
        return self.factor ** sum(moment.seen > milestone * moment.total for milestone in self.milestones)
