"""Does a model copy its training images? How near made images lie to them, in the space of an encoder that judges.

Authenticity (AuthPct): Alaa et al., "How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and
Auditing Generative Models" (ICML 2022), section 4.4: a made image is not authentic if it is closer to its nearest
training image than that one is to its own nearest. New images of the data's own distribution are not all authentic
either: in many dimensions about half are. What is to be expected is found from the training images themselves, each
taken as though it were a made one and left out of the others, which follows the same law.
Shape letters: N made images, M of the training stream, D width.
"""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.core.evaluation import EvalContext, Figure, Number, Output, Table
from pipeline.dist.group import Place
from pipeline.evals._judged import Judged, JudgedConfig
from pipeline.evals._neighbours import nearest
from pipeline.evals._samples import chosen, picked
from pipeline.nn.pictures import Line, beneath, verdict

COPY = 0.01
"""Quantile of training images' distances to each other; made images nearer than that to one are near copies."""


class Config(JudgedConfig):
    """Settings of the memorisation; the reference must be what the model was trained on."""

    shown: Annotated[int, Field(ge=0)] = 8
    """Most suspicious samples that are shown with what they are near to; that takes a pass over the images."""


class Near(NamedTuple):
    """Of N images and the training image nearest to each."""

    distance: Tensor
    """float64[N], from the image to it."""
    own: Tensor
    """float64[N], from it to the nearest other training image."""
    index: Tensor
    """int64[N], which it is."""

    @property
    def authentic(self) -> Tensor:
        """bool[N]."""
        return self.distance > self.own

    @property
    def ratio(self) -> Tensor:
        """float64[N], of the two distances; not authentic are those from 0 to 1."""
        return self.distance / self.own.clamp_min(1e-300)


class Memorisation(Judged):
    """Reports "memorisation/authenticity", the part of the samples that are no closer to a training image than
    that one's nearest, and "memorisation/authenticity_real", the same of training images left out in turn.

    "memorisation/copies" is the part of the samples that are as near to a training image as the nearest hundredth of
    the training images are to others, and "memorisation/copies_real" about that hundredth: a model that copies has more
    and less authenticity than is real. The
    table "memorisation/suspects" and the figure "memorisation/nearest" show the most suspicious.
    """

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]
    fewest = 3

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Make and encode; every rank compares its part of the samples.

        Raises:
            DataError: a feature is not finite.
            NonFiniteError: a sample is not finite.
        """
        own, split = self.config, self.config.reference
        seen, real = self.judged(ctx, own.space), self.real(ctx)
        found, among = near(seen.x, real, ctx.place), left_out(real, len(seen.x), ctx.place)
        close = among.distance.quantile(COPY)
        yield _share("memorisation/authenticity", found.authentic, split, "higher")
        yield _share("memorisation/copies", found.distance <= close, split, "lower")
        if own.baseline:
            yield _share("memorisation/authenticity_real", among.authentic, split)
            yield _share("memorisation/copies_real", among.distance <= close, split)
        if own.shown:
            suspects = found.ratio.argsort(stable=True)[: own.shown]
            yield _table(seen.id, found, suspects, split)
            yield self._figure(ctx, seen.id[suspects], found.index[suspects], found.ratio[suspects])

    def _figure(self, ctx: EvalContext, ids: Tensor, nearest: Tensor, ratio: Tensor) -> Figure:
        made = picked(((part.id, part.image) for part in self.made(ctx)), ids)
        stream = ctx.streams[self.config.reference]
        real = picked(((batch["id"], batch["image"]) for batch in stream), nearest)
        notes = [[Line(f"{r:.2f}", verdict(r > 1)) for r in ratio.tolist()], [Line(f"{i}") for i in nearest.tolist()]]
        picture = beneath(["most suspicious samples", "the training images nearest to them"], [made, real], notes)
        caption = (
            f"Beneath a sample: its distance to the training image below it, over that one's to its nearest; from 0 "
            f"to 1 it is not authentic. Beneath a training image: its number in {self.config.reference!r}"
        )
        return Figure("memorisation/nearest", picture, caption, self.config.reference)


def near(x: Tensor, real: Tensor, place: Place) -> Near:
    """The training images of features [M,D] nearest to images of features [N,D]; the same on every rank."""
    distance, index = (found[:, 0] for found in nearest(x, real, 1, place))
    which, back = index.unique(return_inverse=True)
    own = nearest(real[which], real, 1, place, own=which)[0][back, 0]
    return Near(distance.sqrt(), own.sqrt(), index)


def left_out(real: Tensor, count: int, place: Place) -> Near:
    """The same of ``count`` training images, drawn from all, each as though it were none of them."""
    rows = chosen(torch.arange(len(real)), len(real), min(count, len(real))).nonzero()[:, 0]
    distance, index = (found[:, 0] for found in nearest(real[rows], real, 1, place, own=rows))
    which, back = index.unique(return_inverse=True)
    others, names = (found[back] for found in nearest(real[which], real, 2, place, own=which))
    own = torch.where(names[:, 0] == rows, others[:, 1], others[:, 0])  # the image that is left out is nobody's nearest
    return Near(distance.sqrt(), own.sqrt(), index)


def _share(name: str, hits: Tensor, split: str, better: Literal["higher", "lower"] | None = None) -> Number:
    p = float(hits.double().mean())
    samples = None if better is None else hits.numpy()
    return Number(name, p, len(hits), split, math.sqrt(p * (1 - p) / len(hits)), better, samples)


def _table(ids: Tensor, found: Near, suspects: Tensor, split: str) -> Table:
    columns = ("sample", "training image", "distance", "distance of that one to its nearest")
    parts = (ids, found.index, found.distance, found.own)
    rows = list(zip(*(part[suspects].tolist() for part in parts), strict=True))
    return Table("memorisation/suspects", columns, rows, split)
