"""What a model makes: a picture of its first samples, for the eye that no number replaces."""

from collections.abc import Iterator
from typing import Annotated

import torch
from pydantic import Field

from pipeline.core.evaluation import EvalContext, Figure
from pipeline.dist.group import gather_objects
from pipeline.evals._samples import OfSamples, SamplesConfig, maker_of, picked
from pipeline.nn.images import tile

ROW = 8
"""Images in a row, of a model that is not told classes."""
WIDEST = 24
"""Most images in a row, where a column is a class."""


class Config(SamplesConfig):
    """Settings of the picture; with the ``samples`` of other evaluations of the suite nothing is made twice."""

    shown: Annotated[int, Field(ge=1, le=1024)] = 64
    """Images that are shown, the first of all."""
    samples: Annotated[int, Field(ge=2)] = 64


class Samples(OfSamples):
    """Reports the figure "samples/grid"; of a model that is told few classes, a column of it is a class."""

    config: Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def run(self, ctx: EvalContext) -> Iterator[Figure]:
        """Make on all ranks, show the first.

        Raises:
            NonFiniteError: a sample is not finite.
        """
        made, classes = self.made(ctx), maker_of(ctx).classes
        ids = torch.tensor(sorted(i for own in gather_objects([i for p in made for i in p.id.tolist()]) for i in own))
        width = classes if 1 < classes <= WIDEST else ROW
        shown = min(self.config.shown, len(ids))
        shown = max(shown - shown % width, min(shown, width))  # whole rows
        images = picked(((part.id, part.image) for part in made), ids[:shown])
        told = "each column a class" if width == classes else "in the order of their numbers"
        yield Figure("samples/grid", tile(list(images.split(width))), f"The first {shown} samples, {told}", "made")
