"""What a classifier loses on data from elsewhere: the accuracy of each domain and of the worst group.

A head is fitted on one domain and measured on others without a look at their labels, as leave-one-domain-out results
are reported (Gulrajani and Lopez-Paz, "In Search of Lost Domain Generalization", ICLR 2021). Groups of samples and the
worst of them: Sagawa et al., "Distributionally Robust Neural Networks for Group Shifts" (ICLR 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Output, Table, Uses
from pipeline.evals._classes import in_classes_of
from pipeline.evals._head import Classifier, HeadConfig, head_of


class Config(HeadConfig):
    """Settings of the drift."""

    test: str = "val"
    """Stream of the domain that the head is fitted on, which it has not seen."""
    domains: tuple[str, ...] = ()
    """Streams of other domains; none: only groups of ``test`` are compared."""
    group: str | None = None
    """A field of the batches with a whole number for each sample, such as "metadata": samples with equal numbers are a
    group within their domain."""
    least: Annotated[int, Field(ge=1)] = 10
    """Samples that a group needs to be counted."""

    @model_validator(mode="after")
    def _apart(self) -> Config:
        names = [self.test, *self.domains]
        if len(set(names)) < len(names):
            raise ValueError("a stream is named twice among 'test' and 'domains'")
        if len(names) == 1 and self.group is None:
            raise ValueError("there is nothing to compare: name other 'domains', or a field that is a 'group'")
        return self


class Group(NamedTuple):
    """Samples that are measured together."""

    domain: str
    number: int | None
    """None: all of the domain."""
    right: np.ndarray
    """bool[n]."""

    @property
    def top1(self) -> float:
        """Share that is right."""
        return float(self.right.mean())

    @property
    def variance(self) -> float:
        """Of :attr:`top1`."""
        return self.top1 * (1 - self.top1) / len(self.right)


class Drift(Evaluation):
    """Reports "drift/top1_STREAM" of each domain, "drift/gap" (the accuracy on its own domain minus the mean over
    the others) and "drift/worst" (the least accuracy of a group, or of a domain without groups).

    The worst is chosen by what it is measured on, so that it lies below the truth where groups are small; its standard
    error is that of the group alone. The table "drift/groups" names it and shows all.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """What the head is fitted on, and all domains."""
        uses = self.config.uses(self.config.test, *self.config.domains)
        extra = (self.config.group,) if self.config.group is not None else ()
        measured = (self.config.test, *self.config.domains)
        return Uses(
            {n: (*fields, *extra) if n in measured else fields for n, fields in uses.streams.items()}, uses.encoders
        )

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """The share of a class."""
        return {f"drift/top1_{self.config.test}": (1 / classes, 1.0)}

    def check(self, ctx: EvalContext) -> None:
        """Another domain is other data."""
        own = ctx.streams[self.config.test].fingerprint
        for name in self.config.domains:
            if ctx.streams[name].fingerprint == own:
                raise ConfigError(f"drift.domains: stream {name!r} is the same data as {self.config.test!r}")

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Fit, classify on all ranks, and measure what all know.

        Raises:
            DataError: a sample is of a class that the head does not know, or the groups are no whole numbers.
        """
        head = head_of(ctx, self.config)
        domains, groups = [], []
        for name in (self.config.test, *self.config.domains):
            right, number = self._classified(ctx, head, name)
            domains.append(Group(name, None, right))
            kinds = [] if number is None else np.unique(number).tolist()
            groups += [Group(name, kind, right[number == kind]) for kind in kinds] or [domains[-1]]
        for own in domains:
            yield Number(f"drift/top1_{own.domain}", own.top1, len(own.right), own.domain, own.variance**0.5,
                         samples=own.right)  # fmt: skip
        first, *others = domains
        if others:
            gap = first.top1 - sum(other.top1 for other in others) / len(others)
            error = math.sqrt(first.variance + sum(other.variance for other in others) / len(others) ** 2)
            n = sum(len(own.right) for own in domains)
            yield Number("drift/gap", gap, n, first.domain, error, better="lower")
        counted = [group for group in groups if len(group.right) >= self.config.least]
        if counted:
            worst = min(counted, key=lambda group: group.top1)
            yield Number("drift/worst", worst.top1, len(worst.right), first.domain, worst.variance**0.5)
        yield Table("drift/groups", ("domain", "group", "samples", "top1", "standard error"), [
            (g.domain, g.number, len(g.right), g.top1, g.variance**0.5) for g in groups
        ], first.domain)  # fmt: skip

    def _classified(self, ctx: EvalContext, head: Classifier, stream: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Whether each sample of a stream is right, bool[N], and its group, int64[N]."""
        field = self.config.group
        found = ctx.features(self.config.encoder, stream, ("label", *([field] if field else [])))
        label = in_classes_of(found, head.classes, stream, head.whose).label
        right = (head.scores(found.x).argmax(dim=1) == label).numpy()
        return right, None if field is None else _numbers(found.fields[field], field, stream)


def _numbers(values: Tensor, field: str, stream: str) -> np.ndarray:
    """Whole numbers int64[N].

    Raises:
        DataError: they are not.
    """
    flat = values.reshape(len(values), -1)
    if flat.shape[1] != 1 or (flat.is_floating_point() and not torch.equal(flat, flat.round())):
        raise DataError(
            f"drift.group: {field!r} of stream {stream!r} is no whole number for each sample; name a field that is one"
        )
    return flat[:, 0].long().numpy()
