"""The peak, throughout: with a cool-down, Zhai et al., "Scaling Vision Transformers" (CVPR 2022), section 3.5."""

from pipeline.config.schedule import Cooled, Moment


class Config(Cooled):
    """Settings of the constant schedule."""

    def part(self, moment: Moment) -> float:
        """All of it."""
        return 1.0
