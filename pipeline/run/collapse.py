"""Says when what is trained collapses: an encoder's features, the codes of an autoencoder. Losses need not show it.

Posterior collapse: Bowman et al., "Generating Sentences from a Continuous Space" (CoNLL 2016, arXiv 1511.06349),
section 3.1. Codebook collapse: Dhariwal et al., "Jukebox" (2020, 2005.00341), section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from pipeline.core.protocols import Clock
from pipeline.nn.spread import Spread
from pipeline.record.metrics import Value

BEGUN = 0.1
"""Part of the run after which codes are judged: at first a posterior is the prior, and no code has been used."""


class Sign(NamedTuple):
    """A metric that shows a collapse."""

    metric: str
    """Its name; with the phase before it, "autoencoder/dead", where there are phases."""
    collapsed: Callable[[float], bool]
    what: str
    """What has happened, with ``{value}``."""
    advice: str


SIGNS = (
    Sign(
        "active",
        lambda share: share < 0.1,
        "the posterior has collapsed: {value:.0%} of the code's channels tell of the image (active), the decoder works "
        "without its code",
        "lower objective.beta, or let channels tell something at no cost (objective.free_bits)",
    ),
    Sign(
        "dead",
        lambda share: share > 0.5,
        "the codebook has collapsed: {value:.0%} of the codes stand for nothing (dead)",
        'start dead codes anew (quantiser = "average" with objective.revive), or take fewer, or cosine = true',
    ),
)


class CollapseWatch:
    """Looks at each line of metrics."""

    def __init__(self) -> None:
        self._collapsed: set[str] = set()

    def look(self, clock: Clock, line: Mapping[str, Value], say: Callable[[str], None]) -> None:
        """Say once that something has collapsed, and again if it does so after it had recovered."""
        if "features_std" in line:
            spread = Spread(float(line["features_std"]), float(line["features_rank"]))
            problem = (
                "the encoder's features have collapsed, images are hardly told apart any more "
                f"(features_std {spread.std:.2g}, 0 is one point; features_rank {spread.rank:.3g}, 1 is one line)",
                "lower the learning rate, or look at what the method has against collapse",
            )
            self._note("features", problem if spread.collapsed else None, clock.step, say)
        for sign in SIGNS if clock.samples >= BEGUN * clock.total_samples else ():
            for value in (float(v) for name, v in line.items() if name.rpartition("/")[2] == sign.metric):
                problem = (sign.what.format(value=value), sign.advice) if sign.collapsed(value) else None
                self._note(sign.metric, problem, clock.step, say)

    def _note(self, name: str, problem: tuple[str, str] | None, step: int, say: Callable[[str], None]) -> None:
        if problem is None:
            self._collapsed.discard(name)
        elif name not in self._collapsed:
            self._collapsed.add(name)
            say(f"step {step}: {problem[0]}. The loss may look right all the same: {problem[1]}")
