"""What the methods share that make two views of an image alike: settings, views, and what they show of themselves.

The colours are BYOL's (Grill et al. 2020, appendix B), which Barlow Twins and VICReg took over: one view is always
blurred, the other seldom, but sometimes solarised. Shape letters: B samples, C channels, D width of the encoder.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.protocols import Batch, DataFacts, PairwiseObjective, Picture, StepContext
from pipeline.nn.augment import Colour, augment
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Match, pairs
from pipeline.nn.start import start_as_moco

SHOWN = 8
"""Samples in the showcase."""
VIEWS = {"": "image", "2": "image2"}
FIRST = Colour(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, blur=1.0)
SECOND = FIRST.model_copy(update={"blur": 0.1, "solarize": 0.2})


class TwoViewConfig(EncoderConfig):
    """Encoder and views; the defaults are the papers' ResNet-50."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    colour: Colour = FIRST
    """Of the first view."""
    colour2: Colour = SECOND
    """Of the second."""


class TwoViewObjective(OneEncoder, PairwiseObjective):
    """An encoder that sees two views of each sample, each view by itself.

    By itself, since views are coloured unequally, and one batch norm over both would mix their statistics: so does the
    code of the methods' authors. Batch norm is over all ranks.

    Args:
        config: encoder and colours.
        facts: of the data.
        name: of the objective, to which its random numbers belong.
    """

    def __init__(self, config: TwoViewConfig, facts: DataFacts, name: str) -> None:
        super().__init__()
        self.needs = dict.fromkeys(VIEWS.values(), f"uint8[B,{len(config.mean)},H,W]")
        self._name, self._colours = name, {"image": config.colour, "image2": config.colour2}
        self.encoder = construct_encoder(
            config, facts.image_size, name, start=start_as_moco, stem_of_small_images=config.small_stem
        )

    @abstractmethod
    def encode(self, view: Tensor) -> dict[str, Tensor]:
        """What is compared of a view, float32[B,C,H,W] from 0 to 1: [B,...] by name; "features": the encoder's."""

    @abstractmethod
    def agreement(self, rows: dict[str, Tensor]) -> Tensor:
        """Cosines of what the method makes of first views (rows) and second ones, float32[B,B]."""

    def view(self, batch: Batch, ctx: StepContext, name: str) -> Tensor:
        """One view of each sample, float32[B,C,H,W] from 0 to 1."""
        return augment(batch[name], batch, ctx, self._colours[name], f"{self._name}.{name}")

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """What :meth:`encode` makes of both views: NAME of the first, NAME2 of the second."""
        rows: dict[str, Tensor] = {}
        for number, name in VIEWS.items():
            with dropping_for(batch, ctx, f"dropout.{name}"):
                rows |= {kind + number: x for kind, x in self.encode(self.view(batch, ctx, name)).items()}
        return rows

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Both crops, and the views that are made of them."""
        seen = {name: (self.view(batch, ctx, name) * 255).round().to(torch.uint8) for name in VIEWS.values()}
        return {"image": batch["image"], "view": seen["image"], "image2": batch["image2"], "view2": seen["image2"]}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Both views of each image, and the second view of another that is most like the first."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        seen = self.inputs(batch, ctx)
        with frozen_statistics(self):
            cosines = self.agreement(self.embed(batch, ctx))
        return {"views": Picture(*pairs(Match(seen["view"], seen["view2"], cosines)))}


def cosines_of(first: Tensor, second: Tensor) -> Tensor:
    """Of all pairs of rows, float32[B,B]."""
    return functional.normalize(first.float(), dim=1) @ functional.normalize(second.float(), dim=1).T
