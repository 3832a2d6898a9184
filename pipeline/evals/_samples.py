"""Images made for evaluations, each on one rank; what is made does not depend on the number of ranks or the batch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.evaluation import EvalContext, EvalStream, Evaluation, Maker, Uses
from pipeline.core.protocols import Batch
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

    image: Tensor
    """uint8[B,C,H,W]."""
    label: Tensor | None
    """int64[B], the class that was asked for, where the model knows any."""


class OfSamples(Evaluation):
    """What evaluations of made images share. They judge them by encoders of another run."""

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
        own = self.config
        key = ("made", own.samples, own.seed, json.dumps(own.sampler, sort_keys=True), own.texts)
        return ctx.once(key, lambda: _make(ctx, own))


def maker_of(ctx: EvalContext) -> Maker:
    """What makes images."""
    return cast("Maker", ctx.encoders["generator"])


def chosen(ids: Tensor, size: int, wanted: int) -> Tensor:
    """Which of ``size`` samples are among ``wanted`` that are spread evenly, bool[B]: a function of ``ids`` alone."""
    return (ids + 1) * wanted // size > ids * wanted // size


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
        made.append(Made(image.cpu(), prompt.get("label")))
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
