"""Images made for an evaluation, each on one rank; what is made does not depend on the number of ranks or the batch."""

from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.errors import NonFiniteError
from pipeline.dist.group import gather_objects
from pipeline.nn.diffusion.model import Generator, SamplerConfig, to_pixels


class SamplesConfig(Strict):
    """Which images are made."""

    samples: Annotated[int, Field(ge=2)] = 10_000
    batch: Annotated[int, Field(ge=1)] = 256
    """On each rank."""
    seed: Annotated[int, Field(ge=0)] = 0
    sampler: SamplerConfig | None = None
    """Left out: that of the training run's showcase."""


def generator_of(encoders: Mapping[str, nn.Module]) -> Generator:
    """What makes images."""
    generator = encoders["generator"]
    assert isinstance(generator, Generator), type(generator)
    return generator


def make(generator: Generator, config: SamplesConfig) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's images, uint8[B,C,H,W] on the model's device, and the classes asked for, all in turn.

    All ranks walk it together: they may have different numbers of batches, and meet once at the end.

    Raises:
        NonFiniteError: on every rank, if a sample of any is not finite.
    """
    device = next(generator.parameters()).device
    mine = torch.arange(dist.get_rank(), config.samples, dist.get_world_size())
    problem: str | None = None
    for ids in mine.split(config.batch):
        ids = ids.to(device)
        label = ids % generator.classes if generator.classes else None
        try:
            x = generator.sample(ids, label, config.seed, config.sampler)
        except NonFiniteError as error:  # the other ranks would wait for this one
            problem = str(error)
            break
        yield to_pixels(x), label
    problems = [p for p in gather_objects(problem) if p is not None]
    if problems:
        raise NonFiniteError(problems[0])
