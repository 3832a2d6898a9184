"""A classifier among samples of classes that it does not know: is it right about those it knows, and finds the others?

OS* is the mean recall of the known classes, UNK the recall of all unknown ones as one class, and HOS is 2 OS* UNK /
(OS* + UNK): Bucci et al., "On the Effectiveness of Image Rotation for Open Set Domain Adaptation" (ECCV 2020). What is
unknown is decided without labels: of two clusters of the answers' entropies the one with the larger (k-means from the
least and the largest one, as Liang et al., "Do We Really Need to Access the Source Data?", ICML 2020, decide it), or by
a least confidence. Shape letters: N samples, K known classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.classes import class_name
from pipeline.core.errors import DataError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Output, Table, Uses

UNKNOWN = "unknown"


class Config(Strict):
    """Settings of the open-set evaluation."""

    test: str = "test"
    """Stream with samples of known and of unknown classes, which are told by their names."""
    confidence: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Below this largest probability a sample is taken for unknown; left out: by two clusters of entropies."""


class Recalls(NamedTuple):
    """What is reported, and what it is made of."""

    known: float
    """OS*."""
    unknown: float
    hos: float
    by_class: list[tuple[str, int, float]]
    """Name, samples and recall of each class that occurs, the unknown ones as the last one."""


class OpenSet(Evaluation):
    """Reports "open_set/hos", "open_set/known" (OS*), "open_set/unknown" and the table "open_set/classes"."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The classifier and the stream."""
        return Uses({self.config.test: ("image", "label")}, ("logits",))

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """What guessing gives depends on how many samples are unknown, so that none is said."""
        return {}

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Classify on all ranks and count.

        Raises:
            DataError: the stream has no sample of a known class, or none of an unknown one.
        """
        known = tuple(map(class_name, ctx.classes["logits"]))
        found, split = ctx.features("logits", self.config.test), self.config.test
        number = {name: place for place, name in enumerate(known)}
        own = torch.tensor([number.get(class_name(name), len(known)) for name in found.classes])
        label = own[found.label]
        strange = int((label == len(known)).sum())
        if strange in (0, len(label)):
            which = "no unknown class" if strange == 0 else "no class that the classifier knows"
            raise DataError(
                f"stream {split!r} has samples of {which}; 'open_set' needs both. Measure it with 'accuracy', or on "
                "data with further classes"
            )
        recalls = recalls_of(decided(found.x, self.config.confidence), label, ctx.classes["logits"])
        yield Number("open_set/hos", recalls.hos, len(label), split)
        yield Number("open_set/known", recalls.known, len(label) - strange, split)
        error = math.sqrt(recalls.unknown * (1 - recalls.unknown) / strange)
        yield Number("open_set/unknown", recalls.unknown, strange, split, error)
        yield Table("open_set/classes", ("class", "samples", "recall"), recalls.by_class, split)


def decided(logits: Tensor, confidence: float | None) -> Tensor:
    """The class that each sample is taken for, int64[N], K for unknown, from float[N,K]."""
    p = logits.double().softmax(dim=1)
    most, best = p.max(dim=1)
    if confidence is not None:
        return best.masked_fill(most < confidence, logits.shape[1])
    entropy = -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum(dim=1)
    return best.masked_fill(in_larger_cluster(entropy), logits.shape[1])


def in_larger_cluster(values: Tensor) -> Tensor:
    """Whether each of float[N] is in the larger of two clusters, by k-means from the ends on: bool[N].

    Of values that are all the same none is.
    """
    low, high = values.min(), values.max()
    while True:
        above = values > (low + high) / 2
        if not above.any():
            return above
        centres = values[~above].mean(), values[above].mean()
        if bool(centres[0] == low) and bool(centres[1] == high):
            return above
        low, high = centres


def recalls_of(guess: Tensor, label: Tensor, classes: tuple[str, ...]) -> Recalls:
    """Recalls of guesses, int64[N], for labels, int64[N], both K for unknown; what does not occur is left out."""
    rows = []
    for number, name in enumerate((*classes, UNKNOWN)):
        mine = label == number
        if mine.any():
            rows.append((name, int(mine.sum()), float((guess[mine] == number).double().mean())))
    *of_known, (_, _, unknown) = rows
    known = sum(recall for _, _, recall in of_known) / len(of_known)
    hos = 2 * known * unknown / (known + unknown) if known + unknown else 0.0
    return Recalls(known, unknown, hos, rows)
