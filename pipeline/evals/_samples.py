"""Images made for evaluations, each on one rank; what is made does not depend on the number of ranks or the batch."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, DataError, NonFiniteError
from pipeline.core.evaluation import EvalContext, EvalStream, Evaluation, Maker, Uses
from pipeline.core.protocols import Batch
from pipeline.dist.gather import gather_ragged
from pipeline.dist.group import gather_objects


class SamplesConfig(Strict):
    """Which images are made."""

    samples: Annotated[int, Field(ge=2)] = 10_000
    batch: Annotated[int, Field(ge=1)] = 256
    """On each rank."""
    seed: Annotated[int, Field(ge=0)] = 0
    sampler: dict[str, Any] = Field(default_factory=dict)
    """How, in the model's own words; left out: as in the training run's showcase."""
    texts: Annotated[str, Field(min_length=1)] | None = None
    """Stream whose texts are asked for, of a model that is told texts; others are asked for all classes in turn."""


class Made(NamedTuple):
    """Images that were made together; in main memory."""

    id: Tensor
    """int64[B]: of the image; of text-told models, of the sample whose text is asked for."""
    image: Tensor
    """uint8[B,C,H,W]."""
    label: Tensor | None
    """int64[B], the class that was asked for, where the model knows any."""


class Seen(NamedTuple):
    """All made images as an encoder sees them, in the order of their ids and the same on every rank."""

    id: Tensor
    """int64[N]."""
    x: Tensor
    """float32[N,D]."""
    label: Tensor | None
    """int64[N], as in :class:`Made`."""


class OfSamples(Evaluation):
    """What evaluations of made images share. They judge them by encoders of another run."""

    version = 2
    judges: Sequence[str] = ()

    def __init__(self, config: SamplesConfig) -> None:
        self.config = config

    def uses(self) -> Uses:
        """The generator and its judges, and the texts that are asked for."""
        texts = {self.config.texts: ("text",)} if self.config.texts is not None else {}
        return Uses(texts, ("generator", *self.judges))

    def check(self, ctx: EvalContext) -> None:
        """Samplers and texts must fit the model."""
        maker = maker_of(ctx)
        maker.settings(self.config.sampler)
        if maker.told == "text":
            name, samples = self.config.texts, self.config.samples
            if name is None:
                raise ConfigError('the model is told texts: name the stream whose texts are asked for, texts = "train"')
            if samples > ctx.streams[name].samples:
                raise ConfigError(
                    f"samples = {samples}: stream {name!r} has {ctx.streams[name].samples} texts to ask for; make fewer"
                )

    def made(self, ctx: EvalContext) -> list[Made]:
        """This rank's images, all classes or texts in turn; made once for all evaluations that ask for the same.

        All ranks call it together: they may have different numbers of batches, and meet once at the end.

        Raises:
            NonFiniteError: on every rank, if a sample of any is not finite.
        """
        return ctx.once(("made", *self._asked()), lambda: _make(ctx, self.config))

    def judged(self, ctx: EvalContext, encoder: str) -> Seen:
        """What an encoder of images makes of all made ones; kept for all evaluations that ask for the same.

        Raises:
            DataError: a feature is not finite.
            NonFiniteError: as :meth:`made`.
        """
        return ctx.once(("judged", encoder, *self._asked()), lambda: _judge(ctx, encoder, self.made(ctx)))

    def _asked(self) -> tuple[Hashable, ...]:
        own = self.config
        return own.samples, own.seed, json.dumps(own.sampler, sort_keys=True), own.texts


def maker_of(ctx: EvalContext) -> Maker:
    """What makes images."""
    return cast("Maker", ctx.encoders["generator"])


def check_told_classes(ctx: EvalContext, name: str) -> None:
    """Hold the model against what the evaluation ``name`` needs.

    Raises:
        ConfigError: it is not told classes.
    """
    if maker_of(ctx).classes == 0:
        raise ConfigError(f'evaluation "{name}" needs a model that was trained with condition = "class"')


def chosen(ids: Tensor, size: int, wanted: int) -> Tensor:
    """Which of ``size`` samples are among ``wanted`` that are drawn once for all, bool[B]: a function of ``ids`` alone.

    Not at even steps: where classes come in turn, some would be left out.
    """
    return _drawn(size, wanted)[ids]


@lru_cache(maxsize=8)
def _drawn(size: int, wanted: int) -> Tensor:
    drawn = torch.zeros(size, dtype=torch.bool)
    drawn[torch.randperm(size, generator=torch.Generator().manual_seed(0))[:wanted]] = True
    return drawn


def in_order(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Columns of rows that the ranks share, the first of them the ids: all rows on every rank, in the order of the ids.

    Args:
        parts: this rank's, [(ids, ...), ...]; some rank has at least one.
    """
    own = [(part.shape[1:], part.dtype) for part in parts[0]] if parts else None
    shapes = next(known for known in gather_objects(own) if known is not None)
    empty = tuple(torch.empty(0, *shape, dtype=dtype) for shape, dtype in shapes)
    columns = [gather_ragged(torch.cat(column)) for column in zip(empty, *parts, strict=True)]
    order = columns[0].argsort()
    return [column[order] for column in columns]


def picked(parts: Iterable[tuple[Tensor, Tensor]], wanted: Tensor) -> Tensor:
    """Some of the images that the ranks share, on every rank.

    Args:
        parts: this rank's, int64[B] and uint8[B,C,H,W] each.
        wanted: the numbers of those that are wanted, int64[N], in the order to give them.
    """
    kept = [(ids[here], images[here]) for ids, images in parts if (here := torch.isin(ids, wanted)).any()]
    ids, images = in_order(kept)
    return images[torch.searchsorted(ids, wanted)]


def finite(x: Tensor, encoder: str, what: str) -> Tensor:
    """Features that nothing can be wrong with.

    Raises:
        DataError: one is not finite.
    """
    if not x.isfinite().all():
        raise DataError(f"the encoder {encoder!r} gives features of {what} that are not finite")
    return x


def _judge(ctx: EvalContext, name: str, made: Sequence[Made]) -> Seen:
    encoder, device = ctx.encoders[name], ctx.place.device
    parts = [
        (part.id, encoder(part.image.to(device)).float().cpu(), *(() if part.label is None else (part.label,)))
        for part in made
    ]
    ids, x, *label = in_order(parts)
    return Seen(ids, finite(x, name, "made images"), label[0] if label else None)


def _make(ctx: EvalContext, config: SamplesConfig) -> list[Made]:
    maker = maker_of(ctx)
    settings = maker.settings(config.sampler)
    if maker.told == "text":
        assert config.texts is not None
        asked = _texts(config.samples, config.batch, ctx.streams[config.texts])
    else:
        asked = _classes(maker, config)
    made: list[Made] = []
    problem, done = None, 0
    for ids, prompt in asked:
        there = {name: value.to(ctx.place.device) for name, value in prompt.items()}
        try:
            image = maker.make(ids.to(ctx.place.device), there, config.seed, settings)
        except NonFiniteError as error:  # the other ranks would wait for this one
            problem = str(error)
            break
        made.append(Made(ids, image.cpu(), prompt.get("label")))
        done += len(ids) * ctx.place.world_size
        ctx.show("made images", min(done, config.samples), config.samples)
    problems = [p for p in gather_objects(problem) if p is not None]
    if problems:
        raise NonFiniteError(problems[0])
    return made


def _classes(maker: Maker, config: SamplesConfig) -> Iterator[tuple[Tensor, Batch]]:
    mine = torch.arange(dist.get_rank(), config.samples, dist.get_world_size())
    for ids in mine.split(config.batch) if len(mine) else ():  # an empty tensor splits into one empty part
        yield ids, {"label": ids % maker.classes} if maker.classes else {}


def _texts(samples: int, batch_size: int, stream: EvalStream) -> Iterator[tuple[Tensor, Batch]]:
    for batch in stream:
        mine = chosen(batch["id"], stream.samples, samples).nonzero()[:, 0]
        for rows in mine.split(batch_size):
            if len(rows):
                yield batch["id"][rows], {name: batch[name][rows] for name in ("text", "text_length")}
