"""DAIC (or DAC): whether two images belong together is learnt from those pairs of which the network is sure itself.

Chang et al., "Deep Adaptive Image Clustering" (ICCV 2017). The network gives each image a label feature, a softmax
over K clusters scaled to length one; pairs with a cosine above an upper threshold are taken for one class, below a
lower one for two, and the rest is left out, until the thresholds have met. Labels come from images as they are,
gradients from distorted ones, as in the authors' code (github.com/vector-1127/DAC). Shape letters: B samples of this
rank, N of all, K clusters.
"""

from typing import Annotated

import torch
from pydantic import Field, model_validator
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
from pipeline.dist.collectives import all_gather, all_reduce, gather_with_gradient, rank_and_world
from pipeline.nn.augment import Colour, augment
from pipeline.nn.batch_norm import GlobalBatchNorm, frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.start import start_as_moco_v2

SHOWN = 8
"""Samples in the showcase."""
EPSILON = 1e-7
"""Cosines stay so far from 0 and 1 in logarithms (Keras')."""


class Config(EncoderConfig):
    """Settings of DAIC; thresholds are the paper's, for any number of epochs."""

    encoder: str = "resnet18"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    clusters: Annotated[int, Field(ge=2)] = 10
    """K, the number of classes that are looked for."""
    upper: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Cosine above which a pair is one of a class, when the run begins."""
    lower: Annotated[float, Field(ge=0, lt=1)] = 0.455
    """Cosine below which it is one of two classes, when the run begins."""
    fall: Annotated[float, Field(gt=0)] = 10.0
    """How many times as fast the upper threshold falls as the lower one rises, until they meet at the run's end."""
    colour: Colour = Colour(brightness=0.1, contrast=0.1, saturation=0.1, hue=0.0, jitter=1.0, grey=0.0, blur=0.0)
    """Of the second view, which is learnt from."""

    @model_validator(mode="after")
    def _apart(self) -> "Config":
        if self.lower >= self.upper:
            raise ValueError(f"'lower' is {self.lower} and 'upper' {self.upper}; the lower one must be smaller")
        return self


class DAIC(OneEncoder, PairwiseObjective):
    """Encoder and a head that ends in K label features.

    The head is the authors': behind the linear layer that takes the place of their last convolution, two more that
    begin as the identity, a batch norm over all ranks behind each.
    """

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        spec = f"uint8[B,{len(config.mean)},H,W]"
        self.needs = {"image": spec, "image2": spec}
        self.config = config
        self.encoder = construct_encoder(
            config, facts.image_size, "daic", start=start_as_moco_v2, stem_of_small_images=config.small_stem
        )
        layers: list[nn.Module] = []
        for width in (self.encoder.dim, config.clusters, config.clusters):
            linear = nn.Linear(width, config.clusters, bias=False)
            if layers:
                nn.init.eye_(linear.weight)
                layers.append(nn.ReLU())
            else:
                nn.init.kaiming_normal_(linear.weight)
            layers += [linear, GlobalBatchNorm(nn.BatchNorm1d(config.clusters))]
        self.head = nn.Sequential(*layers)

    def thresholds(self, progress: float) -> tuple[float, float]:
        """Upper and lower one, after a part of the run; they meet at its end.

        The paper's 0.95 - x and 0.455 + 0.1 x, with x from 0 to 0.45 in steps of its learning rate.
        """
        config = self.config
        way = progress * (config.upper - config.lower) / (1 + config.fall)
        return config.upper - config.fall * way, config.lower + way

    def view(self, batch: Batch, ctx: StepContext) -> Tensor:
        """What is learnt from: the second crop, distorted; float32[B,C,H,W] from 0 to 1."""
        return augment(batch["image2"], batch, ctx, self.config.colour, "daic.image2")

    def label_features(self, features: Tensor) -> Tensor:
        """The encoder's features, float[B,D], to unit vectors float32[B,K] without negative numbers."""
        return functional.normalize(self.head(features).float().softmax(dim=1), dim=1)

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Label features float32[B,K]: "seen" of distorted images, "told" of images as they are, without gradient.

        "features", float[B,D], are the encoder's of distorted images, without gradient.
        """
        with torch.no_grad(), frozen_statistics(self), dropping_for(batch, ctx, "dropout.told"):
            told = self.label_features(self.encoder(batch["image"]))
        with dropping_for(batch, ctx, "dropout.seen"):
            features = self.encoder(self.view(batch, ctx))
            return {"seen": self.label_features(features), "told": told, "features": features.detach()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Binary cross-entropy of the cosines of all pairs of different samples of which the network is sure.

        "sure" is their part of all pairs, "together" the part of the sure ones that are taken for one class, and
        "clusters" how many clusters have samples of the global batch.
        """
        seen, told = embeddings.rows["seen"].float(), embeddings.rows["told"].detach().float()
        everyone = all_gather(told)
        upper, lower = self.thresholds(min(1.0, ctx.clock.progress))
        with torch.autocast(seen.device.type, enabled=False):  # bf16 would move pairs over the thresholds
            cosine, found = told @ everyone.T, seen @ gather_with_gradient(seen).T
        same = cosine > upper
        sure = (same | (cosine < lower)) & ~self._self_pairs(cosine)
        counts = all_reduce(torch.stack([sure.sum(), (sure & same).sum()]).double())
        found = found.clamp(EPSILON, 1 - EPSILON)
        cross = -torch.where(same, found.log(), (1 - found).log())
        # The mean over the pairs of all ranks, as a mean over samples.
        losses = (cross * sure).sum(dim=1) * (len(everyone) / counts[0].clamp_min(1)).to(found.dtype)
        clusters = everyone.argmax(dim=1).bincount(minlength=self.config.clusters)
        metrics = {
            "sure": (counts[0] / (len(everyone) * (len(everyone) - 1))).float(),
            "together": (counts[1] / counts[0].clamp_min(1)).float(),
            "clusters": (clusters > 0).sum().float(),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), embeddings.rows["features"])

    def _self_pairs(self, cosine: Tensor) -> Tensor:
        """bool[B,N]: where a sample meets itself."""
        own = torch.arange(len(cosine), device=cosine.device) + rank_and_world()[0] * len(cosine)
        return own[:, None] == torch.arange(cosine.shape[1], device=cosine.device)

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image that is labelled, the second crop, and what is made of it."""
        view = (self.view(batch, ctx) * 255).round().to(torch.uint8)
        return {"image": batch["image"], "image2": batch["image2"], "view": view}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Images and the views that are learnt from, each with its cluster."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        with frozen_statistics(self):
            rows = self.embed(batch, ctx)
        told, seen = (rows[name].argmax(dim=1).tolist() for name in ("told", "seen"))
        notes = [
            [Line(f"{k}") for k in told],
            [Line(f"{k}", verdict(k == own)) for own, k in zip(told, seen, strict=True)],
        ]
        titles = ["image and its cluster", "what is learnt from, and its cluster"]
        upper, lower = self.thresholds(min(1.0, ctx.clock.progress))
        text = f"Of {self.config.clusters} clusters; one class above {upper:.2f}, two below {lower:.2f}"
        return {"clusters": Picture(beneath(titles, [batch["image"], self.inputs(batch, ctx)["view"]], notes), text)}
