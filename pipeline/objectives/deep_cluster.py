"""DeepCluster: k-means of the encoder's own features gives labels, which the encoder is then trained to tell.

Caron et al., "Deep Clustering for Unsupervised Learning of Visual Features" (ECCV 2018), arXiv 1807.05520. A survey of
the data set before every epoch takes features of centre crops, reduces and whitens them, and clusters them; the
classifier begins anew. Shape letters: B samples, N of the data set, D width, K clusters.
"""

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.durations import Duration
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput, Survey
from pipeline.dist.gather import gather_ragged
from pipeline.nn.clustering.agreement import mutual_information
from pipeline.nn.clustering.kmeans import kmeans
from pipeline.nn.clustering.whitening import whitened
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.start import start_as_moco_v2

SHOWN = 8
"""Samples in the showcase."""
SURVEY = "clusters"
HEAD_STD = 0.01
"""Of the classifier's fresh weights."""


class Config(EncoderConfig):
    """Settings of DeepCluster; the defaults are the paper's for ImageNet, on a ResNet-50 and on colours as they are.

    The paper's AlexNet and VGG-16 see two channels of Sobel edges instead.
    """

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    clusters: Annotated[int, Field(ge=2)] = 10000
    """K."""
    components: Annotated[int, Field(ge=1)] = 256
    """Principal components of the features that are clustered; fewer where features have fewer that vary."""
    iterations: Annotated[int, Field(ge=1)] = 20
    """Of k-means, at most."""
    every: Duration = Duration(1.0, "ep")
    """From one clustering to the next."""


class DeepCluster(OneEncoder, Objective):
    """Encoder, a linear classifier of clusters, and the cluster of every sample.

    Clusters count alike: a sample's loss is weighted by N / (K * size of its cluster), which the paper, section 3.3,
    gives as the equivalent of drawing samples uniformly over clusters; so the stream stays that of every other method.
    """

    labels: Tensor
    sizes: Tensor
    agreement: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        if facts.samples < config.clusters:
            raise ConfigError(
                f"objective.clusters: {config.clusters} clusters of a data set of {facts.samples} samples; set fewer"
            )
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.encoder = construct_encoder(
            config, facts.image_size, "deep_cluster", start=start_as_moco_v2, stem_of_small_images=config.small_stem
        )
        self.head = nn.Linear(self.encoder.dim, config.clusters)
        for name, value in self.fresh(SURVEY).items():
            self.get_parameter(name).data.copy_(value)
        # Until the first survey, which is before the first update, clusters are drawn at chance.
        self.register_buffer("labels", torch.randperm(facts.samples) % config.clusters)
        each, more = divmod(facts.samples, config.clusters)
        self.register_buffer("sizes", each + (torch.arange(config.clusters) < more).long())
        self.register_buffer("agreement", torch.zeros(1))

    def surveys(self) -> Mapping[str, Survey]:
        """Of all samples of the data set."""
        return {SURVEY: Survey(self.config.every)}

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Features float32[B,D]."""
        return {"feature": self.encoder(batch["image"]).float()}

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        """Cluster the features; "agreement" with the clusters before is their normalised mutual information."""
        x = whitened(rows["feature"], self.config.components)
        sample = {"id": rows["id"], "epoch": torch.full_like(rows["id"], ctx.clock.step)}
        draws = ctx.random(sample, "deep_cluster.centres").uniform()
        found = kmeans(x, self.config.clusters, draws, self.config.iterations)
        place, label = gather_ragged(rows["id"]), gather_ragged(found.label)
        self.agreement.fill_(mutual_information(self.labels[place], label))
        self.labels[place] = label
        self.sizes.copy_(found.sizes)

    def fresh(self, survey: str) -> Mapping[str, Tensor]:
        """The classifier: clusters have no order, so that of the last ones is of no use."""
        weight = HEAD_STD * torch.randn(self.config.clusters, self.encoder.dim)
        return {"head.weight": weight, "head.bias": torch.zeros(self.config.clusters)}

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropy with the samples' clusters, weighted so that clusters count alike.

        "top1" is the part of samples whose cluster is told; "nmi" how far the clusters are those of the survey before
        (0 at the first); "clusters" how many have samples, "largest" the part of the data set in the largest.
        """
        with dropping_for(batch, ctx):
            features = self.encoder(batch["image"])
        logits = self.head(features).float()
        label = self.labels[batch["id"]]
        filled = (self.sizes > 0).sum()
        weight = self.sizes.sum() / (filled * self.sizes[label])
        losses = weight.to(logits.dtype) * functional.cross_entropy(logits, label, reduction="none")
        metrics = {
            "top1": (logits.detach().argmax(dim=1) == label).float().mean(),
            "nmi": self.agreement.float().squeeze(),
            "clusters": filled.float(),
            "largest": self.sizes.max() / self.sizes.sum(),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), features.detach())

    def layers(self) -> list[list[str]]:
        """Stem and blocks; the classifier comes after the last."""
        return [list(layer) for layer in self.encoder.layers("encoder.")]

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Images, the cluster that each is in, and the one that it is taken for."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        with dropping_for(batch, ctx):
            told = self.head(self.encoder(batch["image"])).argmax(dim=1).tolist()
        own = self.labels[batch["id"]].tolist()
        notes = [Line(f"{k} as {guess}", verdict(k == guess)) for k, guess in zip(own, told, strict=True)]
        text = f"Clusters of images, of {self.config.clusters}, and those that the classifier sees"
        return {"clusters": Picture(beneath(["cluster, and what it is taken for"], [batch["image"]], [notes]), text)}
