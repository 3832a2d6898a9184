"""Says when generator and critic have lost each other: samples that are all alike, or scores that grow and grow.

Losses do not show it: those of both may look right while a generator makes one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pipeline.record.metrics import Value

ALIKE = 0.05
"""Samples lie apart by less than this part of what images of the data do, squared distances of features: collapsed."""
PATIENCE = 20
"""Lines in a row, of a generator that has never made anything else: it begins with images that are much alike."""
LARGEST = 1000.0
"""Of a critic's mean score; those of a critic that is held back stay within some tens."""


class RivalryWatch:
    """Looks at each line of metrics that has a critic's."""

    def __init__(self) -> None:
        self._alike = 0
        self._varied = False
        self._said = False
        self._diverged = False

    def look(self, step: int, line: Mapping[str, Value], say: Callable[[str], None]) -> None:
        """Say once what has gone wrong, and again if it does so after it had been right."""
        own = {name.rpartition("/")[2]: value for name, value in line.items() if name.startswith("critic/")}
        if {"unlike_fake", "unlike_real"} <= own.keys():
            self._look_at_samples(step, float(own["unlike_fake"]), float(own["unlike_real"]), say)
        if {"real", "fake"} <= own.keys():
            self._look_at_scores(step, float(own["real"]), float(own["fake"]), say)

    def _look_at_samples(self, step: int, fake: float, real: float, say: Callable[[str], None]) -> None:
        alike = fake < ALIKE * real
        self._alike = self._alike + 1 if alike else 0
        if alike and not self._said and (self._varied or self._alike >= PATIENCE):
            self._said = True
            say(
                f"step {step}: the generator has collapsed, its samples are much more alike than images of the data "
                f"(critic/unlike_fake {fake:.2g}, critic/unlike_real {real:.2g}). Hold the critic back "
                "(objective.penalty, critic.spectral), or lower the learning rates"
            )
        if not alike:
            self._varied, self._said = True, False

    def _look_at_scores(self, step: int, real: float, fake: float, say: Callable[[str], None]) -> None:
        diverged = max(abs(real), abs(fake)) > LARGEST
        if diverged and not self._diverged:
            say(
                f"step {step}: the critic diverges, its mean scores are {real:.3g} for data and {fake:.3g} for "
                "samples. Hold it back (objective.penalty, critic.spectral), or lower phases.critic.optimizer.lr"
            )
        self._diverged = diverged
