"""SimCLR: two distorted views of an image find each other among all views of the batch.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020),
https://arxiv.org/abs/2002.05709; the three-layer head is that of its second version (arXiv 2006.10029).
Shape letters: B samples, D width of the encoder, E width of the projection.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import (
    Batch,
    DataFacts,
    Embeddings,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.nn.augment import Colour, augment
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.contrastive import nt_xent
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.pictures import Match, pairs
from pipeline.nn.projection import projection
from pipeline.nn.start import start_as_moco

SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of SimCLR; the defaults are the paper's ResNet-50 on ImageNet."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    layers: Annotated[int, Field(ge=1, le=3)] = 2
    """Of the projection head."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width inside the head; left out: the encoder's."""
    dim: Annotated[int, Field(ge=1)] = 128
    """E."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    loss: Literal["mean", "sum"] = "mean"
    """Mean over both views, as the paper writes it, or the sum of both directions, twice as large, as the authors' code
    has it: AdamW does not see it, and LARS only where it does not adapt (norms and biases)."""
    colour: Colour = Colour()
    share: Literal["gathered", "blocks"] = "gathered"
    """Features of all ranks at once, or (slower, for the largest batches) one rank's after the other's."""


class SimCLR(PairwiseObjective):
    """Encoder and projection head; batch norm is that of the batch of all ranks, as the paper has it."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        spec = f"uint8[B,{len(config.mean)},H,W]"
        self.needs = {"image": spec, "image2": spec}
        self.config = config
        self.encoder = construct_encoder(
            config, facts.image_size, "simclr", start=start_as_moco, stem_of_small_images=config.small_stem
        )
        hidden = config.hidden or self.encoder.dim
        widths = [self.encoder.dim, *[hidden] * (config.layers - 1), config.dim]
        self.head = projection(widths, norm=True, last="scaled")

    def views(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Both views of all samples, float32[2B,C,H,W] from 0 to 1, first views first."""
        return torch.cat(
            [augment(batch[name], batch, ctx, self.config.colour, f"simclr.{name}") for name in ("image", "image2")]
        )

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Unit vectors float32[B,E] of both views, in one forward: their batch statistics are common.

        "features", float[B,D], are the encoder's of the first view, without gradient.
        """
        with dropping_for(batch, ctx):
            h = self.encoder(self.views(batch, ctx))
            z = functional.normalize(self.head(h).float(), dim=1)
        first, second = z.chunk(2)
        return {"first": first, "second": second, "features": h.detach().chunk(2)[0]}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """NT-Xent; "agreement" is the mean cosine of the two views of a sample."""
        first, second = embeddings.rows["first"], embeddings.rows["second"]
        scale = first.new_full((1,), 1 / self.config.temperature)
        losses = nt_xent(first, second, scale, share=self.config.share, reduction="none")
        if self.config.loss == "sum":
            losses = 2 * losses
        agreement = (first * second).detach().sum(dim=1).mean()
        return StepOutput(losses.mean(), {"agreement": agreement}, losses.detach(), embeddings.rows["features"])

    def encoders(self) -> dict[str, nn.Module]:
        """The encoder without the head."""
        return {"image": self.encoder}

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Both crops, and the views that are made of them."""
        first, second = (self.views(batch, ctx) * 255).round().to(torch.uint8).chunk(2)
        return {"image": batch["image"], "view": first, "image2": batch["image2"], "view2": second}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Both views of each image, and the view of another that is most like the first."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        seen = self.inputs(batch, ctx)
        first, second = seen["view"], seen["view2"]
        with frozen_statistics(self):
            z = self.embed(batch, ctx)
        return {"views": Picture(*pairs(Match(first, second, z["first"] @ z["second"].T)))}
