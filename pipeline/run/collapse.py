"""Says when the features of an encoder collapse while it is trained: losses alone need not show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.nn.spread import Spread
from pipeline.record.metrics import Value


class CollapseWatch:
    """Looks at each line of metrics."""

    def __init__(self) -> None:
        self._collapsed = False

    def look(self, step: int, line: Mapping[str, Value], say: Callable[[str], None]) -> None:
        """Say once that features have collapsed, and again if they do so after they had recovered."""
        if "features_std" not in line:
            return
        spread = Spread(float(line["features_std"]), float(line["features_rank"]))
        if spread.collapsed and not self._collapsed:
            say(
                f"step {step}: the encoder's features have collapsed, images are hardly told apart any more "
                f"(features_std {spread.std:.2g}, 0 is one point; features_rank {spread.rank:.3g}, 1 is one line). "
                "The loss may look right all the same: lower the learning rate, or look at what the method has against "
                "collapse"
            )
        self._collapsed = spread.collapsed
