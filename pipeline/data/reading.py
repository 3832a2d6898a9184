"""Which samples a rank's micro-batches hold, for training and for evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from pipeline.data.mixture import Mixture
from pipeline.data.order import Draw, Order


class ReadingPlan(Protocol):
    """Which samples a rank's micro-batches hold."""

    @property
    def count(self) -> int | None:
        """Number of micro-batches; None: endless."""
        ...

    @property
    def size(self) -> int:
        """Samples of a micro-batch; the last may be smaller."""
        ...

    def draw(self, number: int) -> Draw:
        """The samples of a micro-batch; none after the last one."""
        ...

    def step(self, number: int) -> int:
        """The global step that a micro-batch belongs to."""
        ...

    def substitute(self, number: int, index: int, attempt: int) -> int | None:
        """The sample that replaces sample ``index`` of a micro-batch, at attempt 1, 2, ...; None: there is none."""
        ...


@dataclass(frozen=True)
class TrainReading:
    """A rank's part of every global batch, in micro-batches: number = step * accumulation + part of the step."""

    order: Order | Mixture
    size: int
    rank: int
    world: int
    count: None = None

    @property
    def accumulation(self) -> int:
        """Micro-batches per step."""
        return self.order.global_batch // (self.world * self.size)

    def step(self, number: int) -> int:
        """The global step that a micro-batch belongs to."""
        return number // self.accumulation

    def _first(self, number: int) -> int:
        return (self.rank * self.accumulation + number % self.accumulation) * self.size

    def draw(self, number: int) -> Draw:
        """The samples of a micro-batch."""
        first = self._first(number)
        return self.order.batch(self.step(number), first, first + self.size)

    def substitute(self, number: int, index: int, attempt: int) -> int | None:
        """Another sample of the same window of the same lane."""
        return self.order.substitute(self.step(number), self._first(number) + index, attempt)


@dataclass(frozen=True)
class SurveyReading:
    """This rank's part of all samples in order, each once; one that cannot be used is replaced by the next."""

    samples: int
    """Of the data set."""
    size: int
    rank: int
    world: int
    wanted: int | None = None
    """So many, drawn once for all; None: all."""

    @cached_property
    def _ids(self) -> np.ndarray:
        """The samples that all ranks look at together, in order."""
        if self.wanted is None or self.wanted >= self.samples:
            return np.arange(self.samples)
        return np.sort(np.random.default_rng(0).choice(self.samples, self.wanted, replace=False))

    @property
    def count(self) -> int:
        """Number of micro-batches."""
        return -(-(self._first(self.rank + 1) - self._first(self.rank)) // self.size)

    @property
    def most(self) -> int:
        """Number of micro-batches on the rank that has the most."""
        return math.ceil(math.ceil(len(self._ids) / self.world) / self.size)

    def _first(self, rank: int) -> int:
        return rank * len(self._ids) // self.world

    def step(self, number: int) -> int:
        """A survey has no steps; micro-batches count."""
        return number

    def draw(self, number: int) -> Draw:
        """The samples of a micro-batch."""
        begin = self._first(self.rank) + number * self.size
        ids = self._ids[begin : min(begin + self.size, self._first(self.rank + 1))]
        return Draw(np.zeros_like(ids), ids)

    def substitute(self, number: int, index: int, attempt: int) -> int | None:
        """The next sample of the data set, whoever's it is, so that ranks make no difference."""
        if attempt >= self.samples:
            return None
        return (int(self.draw(number).id[index]) + attempt) % self.samples


@dataclass(frozen=True)
class EvalReading:
    """Samples ``first`` to ``last`` (exclusive) in order, each once, none replaced."""

    first: int
    last: int
    size: int

    @property
    def count(self) -> int:
        """Number of micro-batches."""
        return -(-(self.last - self.first) // self.size)

    def step(self, number: int) -> int:
        """Evaluation has no steps; micro-batches count."""
        return number

    def draw(self, number: int) -> Draw:
        """The samples of a micro-batch."""
        begin = self.first + number * self.size
        ids = np.arange(begin, min(begin + self.size, self.last))
        return Draw(np.zeros_like(ids), ids)

    def substitute(self, number: int, index: int, attempt: int) -> None:
        """None: a score over other samples than the promised ones is no score."""
        return None


@dataclass(frozen=True)
class AugmentedReading:
    """Batches of samples in order, each sample with all its augmentations after each other.

    A sample that cannot be used is replaced by the next, whose id then stands in its place.
    """

    bounds: np.ndarray
    """int64[count,2]: first sample of each batch, and the one after its last."""
    augmentations: int
    size: int
    """Rows of the largest batch."""
    samples: int
    """Of the data set."""

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(self.bounds)

    def step(self, number: int) -> int:
        """There are no steps; batches count."""
        return number

    def draw(self, number: int) -> Draw:
        """The samples of a batch; the epoch is the augmentation."""
        if number >= self.count:
            return Draw(np.empty(0, np.int64), np.empty(0, np.int64))
        ids = np.arange(*self.bounds[number])
        return Draw(np.tile(np.arange(self.augmentations), len(ids)), np.repeat(ids, self.augmentations))

    def substitute(self, number: int, index: int, attempt: int) -> int | None:
        """The next sample of the data set."""
        return (int(self.draw(number).id[index]) + attempt) % self.samples if attempt < self.samples else None
