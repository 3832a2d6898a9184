"""MoCo: a query finds its key, made by a slowly moving copy of the encoder, among many others.

Version 2 with a queue of keys: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning" (CVPR
2020), and Chen et al., "Improved Baselines with Momentum Contrastive Learning" (arXiv 2003.04297). Version 3 without a
queue, with a predictor and both views as queries: Chen, Xie and He, "An Empirical Study of Training Self-Supervised
Vision Transformers" (ICCV 2021). Shape letters: B samples, K keys in the queue, E width of keys, W ranks.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Average,
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
from pipeline.nn.batch_norm import average_statistics, frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.contrastive import in_batch_nce, queue_nce
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Match, pairs
from pipeline.nn.projection import projection
from pipeline.nn.start import start_as_moco, start_as_moco_v2

SHOWN = 8
"""Samples in the showcase."""
MOCO_COLOUR = Colour(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


class Config(EncoderConfig):
    """Settings of MoCo; the defaults are version 2's ResNet-50."""

    encoder: str = "resnet50"
    version: Literal[2, 3] = 2
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    freeze_patches: bool = False
    """Leave a vision transformer's patch embedding as it was drawn (version 3, section 4.2)."""
    layers: Annotated[int, Field(ge=1, le=3)] = 2
    """Of the projection head."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width inside the heads; left out: the encoder's."""
    dim: Annotated[int, Field(ge=1)] = 128
    """E."""
    queue: Annotated[int, Field(ge=1)] = 65536
    """K (version 2); a multiple of the global batch keeps all keys equally long."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    """What the copy keeps of itself in each update; version 3 raises it to 1 on a cosine."""
    temperature: Annotated[float, Field(gt=0)] = 0.2
    norm_batch: Annotated[int, Field(ge=2)] | None = None
    """Images whose statistics batch norm takes together (version 2; the paper's 8 GPUs had 32 each); left out: a
    rank's micro-batch. On one rank it is needed: else a query and its key share their statistics, which older keys in
    the queue do not, and the loss is met by telling batches apart."""
    colour: Colour = MOCO_COLOUR
    colour2: Colour | None = None
    """Of the second view; left out: the same."""

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.version == 3 and self.norm_batch is not None:
            raise ValueError("norm_batch: version 3 takes the statistics over all ranks; leave it out")
        return self


class MoCo(OneEncoder, PairwiseObjective):
    """Encoder, heads, momentum copies and queue.

    Batch norm: version 2 keeps it per rank, or per ``norm_batch`` images, and shuffles the keys' images over all of
    these, so that the statistics do not betray which key belongs to a query; version 3 takes it over all ranks.
    """

    queue: Tensor
    filled: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        spec = f"uint8[B,{len(config.mean)},H,W]"
        self.needs = {"image": spec, "image2": spec}
        self.config = config
        modern = config.version == 3
        self.encoder = construct_encoder(
            config,
            facts.image_size,
            "moco",
            start=start_as_moco if modern else start_as_moco_v2,
            stem_of_small_images=config.small_stem,
            norm_over_ranks=modern,
        )
        if config.freeze_patches:
            self.encoder.backbone.patch_embed.requires_grad_(False)
        hidden = config.hidden or self.encoder.dim
        widths = [self.encoder.dim, *[hidden] * (config.layers - 1), config.dim]
        self.head = projection(widths, norm=modern, last="plain" if modern else "none")
        self.momentum = nn.ModuleDict({"encoder": copy.deepcopy(self.encoder), "head": copy.deepcopy(self.head)})
        self.momentum.requires_grad_(False)
        self.predictor = None
        if modern:
            # The authors' ResNets end in the predictor's linear layer, their transformers in a norm behind it.
            last = "plain" if isinstance(self.encoder.backbone, VisionTransformer) else "none"
            self.predictor = projection([config.dim, hidden, config.dim], norm=True, last=last)
        else:
            self.register_buffer("queue", functional.normalize(torch.randn(config.queue, config.dim), dim=1))
            self.register_buffer("filled", torch.zeros(1, dtype=torch.int64))
        self._fresh: Tensor | None = None

    def view(self, batch: Batch, ctx: StepContext, name: str) -> Tensor:
        """One view of each sample, float32[B,C,H,W] from 0 to 1."""
        second = name == "image2" and self.config.colour2 is not None
        colour = self.config.colour2 if second else self.config.colour
        assert colour is not None
        return augment(batch[name], batch, ctx, colour, f"moco.{name}")

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Unit vectors float32[B,E]: queries with gradient, keys without.

        "features", float[B,D], are the encoder's of the first view, without gradient.

        Raises:
            ConfigError: ``norm_batch`` does not divide the micro-batch.
        """
        size, count = self.config.norm_batch, len(batch["id"])
        if size and count % size:
            raise ConfigError(
                f"objective.norm_batch = {size} does not divide the {count} images of a micro-batch; change one of "
                "objective.norm_batch and engine.micro_batch"
            )
        if self.predictor is None:
            return self._in_parts(self._query, batch, ctx, "image") | {"key": self._shuffled_keys(batch, ctx)}
        rows: dict[str, Tensor] = {}
        # Each view by itself: views are coloured unequally, and one batch norm over both would mix their statistics.
        for number, name in (("", "image"), ("2", "image2")):
            view = self.view(batch, ctx, name)
            for kind, encode in (("query", self._query), ("key", self._key)):
                with dropping_for(batch, ctx, f"dropout.{kind}.{name}"):
                    rows |= {row + number: x for row, x in encode(view).items()}
        return rows

    def _query(self, x: Tensor) -> dict[str, Tensor]:
        features = self.encoder(x)
        z = self.head(features)
        query = functional.normalize((z if self.predictor is None else self.predictor(z)).float(), dim=1)
        return {"query": query, "features": features.detach()}

    @torch.no_grad()
    def _key(self, x: Tensor) -> dict[str, Tensor]:
        return {"key": functional.normalize(self.momentum["head"](self.momentum["encoder"](x)).float(), dim=1)}

    def _in_parts(
        self, encode: Callable[[Tensor], dict[str, Tensor]], batch: Batch, ctx: StepContext, name: str
    ) -> dict[str, Tensor]:
        """What is made of a view of each sample, [B,...]; what goes through batch norm together is a part."""
        count = len(batch["id"])
        size = self.config.norm_batch or count
        parts: list[dict[str, Tensor]] = []
        for first in range(0, count, size):
            part = {field: value[first : first + size] for field, value in batch.items()}
            with dropping_for(part, ctx, f"dropout.{name}"):
                parts.append(encode(self.view(part, ctx, name)))
        return {kind: torch.cat([part[kind] for part in parts]) for kind in parts[0]}

    def _shuffled_keys(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Keys of the second views, each made on a rank that chance decides, in the company that chance decides."""
        rank, world = rank_and_world()
        if world == 1 and self.config.norm_batch is None:
            return self._in_parts(self._key, batch, ctx, "image2")["key"]
        everyone = {name: all_gather(batch[name]) for name in ("id", "epoch", "image2")}
        # A random number of each sample sorts them: the same order on all ranks, without a message.
        order = ctx.random(everyone, "moco.shuffle").uniform().argsort(stable=True)
        mine = {name: value[order.chunk(world)[rank]] for name, value in everyone.items()}
        keys = all_gather(self._in_parts(self._key, mine, ctx, "image2")["key"])
        return keys[order.argsort().chunk(world)[rank]]

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """InfoNCE of queries and keys; "agreement" is the mean cosine of a query and its key."""
        rows = embeddings.rows
        scale = rows["query"].new_full((1,), 1 / self.config.temperature)
        if self.predictor is None:
            losses = queue_nce(rows["query"], rows["key"], self.queue, scale, reduction="none")
            self._fresh = rows["key"].detach()
            agreement = (rows["query"] * rows["key"]).sum(dim=1)
        else:
            both = (("query", "key2"), ("query2", "key"))
            parts = [in_batch_nce(rows[query], rows[key], scale, reduction="none") for query, key in both]
            # 2 T: the paper's code makes the gradient's size independent of the temperature.
            losses = (parts[0] + parts[1]) * (2 * self.config.temperature)
            agreement = (rows["query"] * rows["key2"]).sum(dim=1)
        told = {"agreement": agreement.detach().mean()}
        return StepOutput(losses.mean(), told, losses.detach(), rows["features"])

    def after_step(self, clock: Clock) -> None:
        """Put the step's keys into the queue, in the order of the global batch, in place of the oldest."""
        if self.predictor is not None:
            return
        assert self._fresh is not None, "no loss was computed since the last update"
        keys = all_gather(self._fresh)[-len(self.queue) :].to(self.queue.dtype)
        places = (self.filled + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[places] = keys
        self.filled.copy_((self.filled + len(keys)) % len(self.queue))
        self._fresh = None
        average_statistics(self)

    def averages(self, clock: Clock) -> Iterable[Average]:
        """The momentum encoder and head."""
        keep = self.config.momentum
        if self.predictor is not None:
            keep = 1 - (1 - keep) * (math.cos(math.pi * clock.progress) + 1) / 2
        for name, module in (("encoder", self.encoder), ("head", self.head)):
            for target, source in zip(self.momentum[name].parameters(), module.parameters(), strict=True):
                yield Average(target, source, keep)

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Both crops, and the views that are made of them: the query's and the key's, in version 3 both at once."""
        views = {name: (self.view(batch, ctx, name) * 255).round().to(torch.uint8) for name in ("image", "image2")}
        return {"image": batch["image"], "view": views["image"], "image2": batch["image2"], "view2": views["image2"]}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """The query's and the key's view of each image, and the key of another that is most like the query."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        views = [self.view(batch, ctx, name) for name in ("image", "image2")]
        with frozen_statistics(self):
            with dropping_for(batch, ctx, "dropout.image"):
                queries = self._query(views[0])["query"]
            with dropping_for(batch, ctx, "dropout.image2"):
                cosines = queries @ self._key(views[1])["key"].T
        first, second = ((view * 255).round().to(torch.uint8) for view in views)
        return {"views": Picture(*pairs(Match(first, second, cosines)))}
