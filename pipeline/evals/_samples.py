"""Images made for evaluations, each on one rank; what is made does not depend on the number of ranks or the batch."""

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.protocols import EvalStream
from pipeline.dist.group import gather_objects
from pipeline.evals._features import named_stream, remembered
from pipeline.nn.conditioning import Prompt, Text
from pipeline.nn.diffusion.model import Generator, SamplerConfig, to_pixels


class SamplesConfig(Strict):
    """Which images are made."""

    samples: Annotated[int, Field(ge=2)] = 10_000
    batch: Annotated[int, Field(ge=1)] = 256
    """On each rank."""
    seed: Annotated[int, Field(ge=0)] = 0
    sampler: SamplerConfig | None = None
    """Left out: that of the training run's showcase."""
    texts: str = "train"
    """Stream whose texts are asked for, of a model that is told texts; others are asked for all classes in turn."""


class Made(NamedTuple):
    """Images that were made together; in main memory."""

    image: Tensor
    """uint8[B,C,H,W]."""
    label: Tensor | None
    """int64[B], the class that was asked for, where the model knows any."""


def generator_of(encoders: Mapping[str, nn.Module]) -> Generator:
    """What makes images."""
    generator = encoders["generator"]
    assert isinstance(generator, Generator), type(generator)
    return generator


def chosen(ids: Tensor, size: int, wanted: int) -> Tensor:
    """Which of ``size`` samples are among ``wanted`` that are spread evenly, bool[B]: a function of ``ids`` alone."""
    return (ids + 1) * wanted // size > ids * wanted // size


def make(generator: Generator, config: SamplesConfig, streams: Mapping[str, EvalStream]) -> list[Made]:
    """This rank's images, all classes or texts in turn; made once for all evaluations that ask for the same.

    All ranks call it together: they may have different numbers of batches, and meet once at the end.

    Raises:
        ConfigError: the stream of texts is unknown, or has not as many.
        NonFiniteError: on every rank, if a sample of any is not finite.
    """
    key = (generator, config.samples, config.seed, config.sampler, config.texts)
    return remembered(key, lambda: _make(generator, config, streams))


def _make(generator: Generator, config: SamplesConfig, streams: Mapping[str, EvalStream]) -> list[Made]:
    asked = _classes(generator, config) if generator.denoiser.reader is None else _texts(config, streams)
    device = next(generator.parameters()).device
    made, problem = [], None
    for ids, prompt in asked:
        if isinstance(prompt, Text):
            there: Prompt | None = Text(prompt.token.to(device), prompt.length.to(device))
        else:
            there = prompt if prompt is None else prompt.to(device)
        try:
            x = generator.sample(ids.to(device), there, config.seed, config.sampler)
        except NonFiniteError as error:  # the other ranks would wait for this one
            problem = str(error)
            break
        made.append(Made(to_pixels(x).cpu(), prompt if isinstance(prompt, Tensor) else None))
    problems = [p for p in gather_objects(problem) if p is not None]
    if problems:
        raise NonFiniteError(problems[0])
    return made


def _classes(generator: Generator, config: SamplesConfig) -> Iterator[tuple[Tensor, Tensor | None]]:
    mine = torch.arange(dist.get_rank(), config.samples, dist.get_world_size())
    for ids in mine.split(config.batch) if len(mine) else ():  # an empty tensor splits into one empty part
        yield ids, ids % generator.classes if generator.classes else None


def _texts(config: SamplesConfig, streams: Mapping[str, EvalStream]) -> Iterator[tuple[Tensor, Text]]:
    stream = named_stream(streams, config.texts, "texts")
    if config.samples > stream.samples:
        raise ConfigError(
            f"samples = {config.samples}: stream {config.texts!r} has {stream.samples} texts to ask for; make fewer"
        )
    for batch in stream:
        if "text" not in batch:
            raise ConfigError(f'stream {config.texts!r} has no texts to ask for; add "text" to the suite\'s fields')
        mine = chosen(batch["id"], stream.samples, config.samples).nonzero()[:, 0]
        for rows in mine.split(config.batch):
            if len(rows):
                yield batch["id"][rows], Text(batch["text"][rows], batch["text_length"][rows])
