"""SwAV: the cluster of one view of an image is predicted from another view, with clusters that are equally large.

Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (NeurIPS 2020),
https://arxiv.org/abs/2006.09882. Shape letters: B samples, V crops of each, E width of the projection, K prototypes,
Q places in the queue.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import (
    Batch,
    Clock,
    DataFacts,
    Embeddings,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.dist.collectives import all_gather, rank_and_world
from pipeline.nn.augment import Colour, augment
from pipeline.nn.batch_norm import GlobalBatchNorm, frozen_statistics
from pipeline.nn.clustering.sinkhorn import LEAST, sinkhorn
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.multicrop import (
    LARGE,
    construct_multicrop,
    crop_needs,
    crop_sizes,
    encode_crops,
)
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.start import start_as_moco_v2

SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of SwAV; the defaults are the paper's ResNet-50 on ImageNet, without a queue.

    How many crops there are ``data.image.crops`` says. The paper keeps the prototypes as they were drawn for the first
    epoch: ``[[optimizer.groups]]`` with ``prefix = "prototypes"`` and ``frozen_until = "1ep"``.
    """

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    hidden: Annotated[int, Field(ge=1)] = 2048
    """Width inside the projection head."""
    dim: Annotated[int, Field(ge=1)] = 128
    """E."""
    prototypes: Annotated[int, Field(ge=2)] = 3000
    """K."""
    temperature: Annotated[float, Field(gt=0)] = 0.1
    epsilon: Annotated[float, Field(ge=LEAST)] = 0.05
    """Of Sinkhorn's entropy: the smaller, the harder the clusters."""
    iterations: Annotated[int, Field(ge=1)] = 3
    """Of Sinkhorn."""
    queue: Annotated[int, Field(ge=0)] = 0
    """Q, samples of steps before that are assigned with those of the batch; for batches smaller than K."""
    queue_from: Annotated[float, Field(ge=0, le=1)] = 0.075
    """Part of the run after which the queue begins to fill; it is used when it is full. The paper: epoch 15 of 200."""
    colour: Colour = Colour()


class Prototypes(nn.Module):
    """Cosines with K trained directions. The authors normalise the weights after each update; here the forward does.

    Which directions they become is the same to first order, and the weights may lie wherever an engine keeps them.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach().clone())

    def forward(self, z: Tensor) -> Tensor:
        """Unit vectors float32[...,E] to float32[...,K]; in fp32 also under autocast."""
        with torch.autocast(z.device.type, enabled=False):
            return functional.linear(z, functional.normalize(self.weight.to(z.dtype), dim=1))


class SwAV(OneEncoder, PairwiseObjective):
    """Encoder, projection head, prototypes and, for small batches, a queue of projections."""

    queue: Tensor
    filled: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        sizes = crop_sizes(facts, "swav")
        self.config, self.needs = config, crop_needs(sizes, len(config.mean))
        self.encoder = construct_multicrop(
            config, sizes, "swav", start=start_as_moco_v2, stem_of_small_images=config.small_stem
        )
        self.head = nn.Sequential(
            nn.Linear(self.encoder.dim, config.hidden, bias=False),
            GlobalBatchNorm(nn.BatchNorm1d(config.hidden)),
            nn.ReLU(),
            nn.Linear(config.hidden, config.dim),
        )
        self.prototypes = Prototypes(config.dim, config.prototypes)
        self.register_buffer("queue", torch.zeros(config.queue, LARGE, config.dim))
        self.register_buffer("filled", torch.zeros(1, dtype=torch.int64))
        self._fresh: Tensor | None = None

    def views(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """All crops, float32[B,C,h,w] from 0 to 1."""
        return {name: augment(batch[name], batch, ctx, self.config.colour, f"swav.{name}") for name in self.needs}

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Of all crops their cosines with the prototypes, float32[B,V,K]; of the first two the unit vectors [B,2,E].

        "features", float[B,D], are the encoder's of the first crop, without gradient.
        """
        views = self.views(batch, ctx)
        features = encode_crops(self.encoder, views, batch, ctx)
        z = functional.normalize(self.head(features).float(), dim=1).unflatten(0, (len(views), -1)).transpose(0, 1)
        first = features.detach()[: len(batch["id"])]
        return {"scores": self.prototypes(z), "z": z[:, :LARGE].detach(), "features": first}

    def shared(self) -> dict[str, Tensor]:
        """Cosines of this rank's part of the queue with the prototypes of this moment: float32[part of Q,2,K]."""
        if not self.config.queue:
            return {}
        rank, world = rank_and_world()
        return {"queued": self.prototypes(self.queue.tensor_split(world)[rank].float()).detach()}

    def codes(self, embeddings: Embeddings) -> Tensor:
        """Assignments of the first two crops, each over the global batch and the queue: float32[B,2,K]."""
        scores = embeddings.rows["scores"].detach()[:, :LARGE].float()
        count, weights = len(scores), None
        if (queued := embeddings.shared.get("queued")) is not None:
            full = (self.filled >= len(self.queue)).double()
            weights = torch.cat([full.expand(len(queued)), full.new_ones(count)])
            scores = torch.cat([queued.detach().float(), scores])
        ways = (self.config.epsilon, self.config.iterations, weights)
        return torch.stack([sinkhorn(crop, *ways)[-count:] for crop in scores.unbind(dim=1)], dim=1)

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Cross-entropy of the clusters of the first two crops, predicted from every other crop.

        "same_cluster" is the part of samples whose first two crops are nearest to the same prototype.
        """
        scores = embeddings.rows["scores"].float()
        codes, found = self.codes(embeddings), functional.log_softmax(scores / self.config.temperature, dim=2)
        others = scores.shape[1] - 1
        parts = [
            -(codes[:, own, None] * found).sum(dim=2).sum(dim=1) + (codes[:, own] * found[:, own]).sum(dim=1)
            for own in range(LARGE)
        ]
        losses = torch.stack(parts).sum(dim=0) / (LARGE * others)
        self._fresh = embeddings.rows["z"].detach()
        nearest = scores.detach()[:, :LARGE].argmax(dim=2)
        same = (nearest[:, 0] == nearest[:, 1]).float().mean()
        return StepOutput(losses.mean(), {"same_cluster": same}, losses.detach(), embeddings.rows["features"])

    def after_step(self, clock: Clock) -> None:
        """Put the step's projections into the queue, in place of the oldest."""
        if not self.config.queue or clock.progress < self.config.queue_from:
            return
        assert self._fresh is not None, "no loss was computed since the last update"
        fresh = all_gather(self._fresh)[-len(self.queue) :].to(self.queue.dtype)
        self.queue[(self.filled + torch.arange(len(fresh), device=fresh.device)) % len(self.queue)] = fresh
        self.filled += len(fresh)
        self._fresh = None

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """All crops, and the views that are made of them."""
        views = {f"{name}, view": (x * 255).round().to(torch.uint8) for name, x in self.views(batch, ctx).items()}
        return {name: batch[name] for name in self.needs} | views

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Every crop of a few images, and the prototype that it is nearest to."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        views = [(x * 255).round().to(torch.uint8) for x in self.views(batch, ctx).values()]
        with frozen_statistics(self):
            nearest = self.embed(batch, ctx)["scores"].argmax(dim=2).T.tolist()
        notes = [
            [Line(str(k), verdict(k == first)) for k, first in zip(row, nearest[0], strict=True)] for row in nearest
        ]
        titles = [f"crop {number + 1} and its nearest prototype" for number in range(len(views))]
        text = f"Nearest of {self.config.prototypes} prototypes; green where it is that of the first crop"
        return {"clusters": Picture(beneath(titles, views, notes), text)}
