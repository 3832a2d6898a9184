"""Exemplar: every image is a class of its own, to be told whatever was done to it.

Dosovitskiy et al., "Discriminative Unsupervised Feature Learning with Convolutional Neural Networks" (NeurIPS 2014),
https://arxiv.org/abs/1406.6909. What the paper draws once, distorted copies of each seed image, is drawn anew in each
epoch here: crop, mirror and scale by [data.image], colours by ``colour``. Shape letters: B samples, C channels,
H height, W width, N images of the data set, which are the classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.augment import Colour, augment
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.start import start_as_moco

SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of exemplar training."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    colour: Colour = Colour()
    """What is done to the colours of each copy."""


class Exemplar(OneEncoder, Objective):
    """Encoder and a linear classifier with a class for each image, so that the data set's size is the head's.

    The paper takes 8,000 to 32,000 images; of a larger set take a part (``data.keep``, ``data.where``).
    """

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        if facts.samples < 2:
            raise ConfigError(
                f"objective 'exemplar' makes a class of each image, and the data set has {facts.samples}; give it more"
            )
        if len(config.mean) != 3:
            raise ConfigError(f"objective 'exemplar' distorts colours of images of 3 channels, not {len(config.mean)}")
        self.needs = {"image": "uint8[B,3,H,W]"}
        self.config, self.classes = config, facts.samples
        self.encoder = construct_encoder(
            config, facts.image_size, "exemplar", start=start_as_moco, stem_of_small_images=config.small_stem
        )
        self.head = nn.Linear(self.encoder.dim, self.classes)
        self._ids_checked = False

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropy of telling which image of the data set it is; "top1" is how often that is right."""
        own = batch["id"]
        if not self._ids_checked:  # once: it waits for the device
            if int(own.max()) >= self.classes:
                raise DataError(
                    f"a sample has number {int(own.max())}, but the data set was counted as {self.classes} images, "
                    "each of which is a class; train on one data set, without others mixed in"
                )
            self._ids_checked = True
        with dropping_for(batch, ctx):
            features = self.encoder(self.distorted(batch, ctx))
        logits = self.head(features).float()
        losses = functional.cross_entropy(logits, own, reduction="none")
        top1 = (logits.detach().argmax(dim=1) == own).float().mean()
        return StepOutput(losses.mean(), {"top1": top1}, losses.detach(), features.detach())

    def distorted(self, batch: Batch, ctx: StepContext) -> Tensor:
        """The copies of a step, float32[B,3,H,W] from 0 to 1."""
        return augment(batch["image"], batch, ctx, self.config.colour, "exemplar")

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The crop, and the copy that is made of it."""
        copy = (self.distorted(batch, ctx) * 255).round().to(torch.uint8)
        return {"image": batch["image"], "distorted": copy}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Crop, distorted copy, and whether the image is known again."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        seen = self.inputs(batch, ctx)
        with dropping_for(batch, ctx):
            sure = self.head(self.encoder(self.distorted(batch, ctx))).float().softmax(dim=1)
        own = sure.gather(1, batch["id"][:, None]).squeeze(1)
        known = sure.argmax(dim=1) == batch["id"]
        notes = [Line(f"{p:.0%}", verdict(bool(k))) for p, k in zip(own.tolist(), known, strict=True)]
        titles = ["the crop", "distorted, and how sure it is of which image that is"]
        picture = beneath(titles, list(seen.values()), [[Line(" ")] * len(own), notes])
        return {
            "exemplar": Picture(picture, f"{float(known.float().mean()):.0%} are known among {self.classes} images")
        }
