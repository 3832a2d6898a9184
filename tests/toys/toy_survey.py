"""A survey: the mean feature of a data set, and each sample's distance from it, which training then predicts.

As the centroids and pseudo-labels of Liang et al., "Do We Really Need to Access the Source Data?" (2020, arXiv
2002.08546), but with numbers in place of labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.config.durations import Duration
from pipeline.config.schema import Strict
from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput, Survey
from pipeline.dist.collectives import all_reduce
from pipeline.dist.gather import gather_ragged

WIDTH = 4


class Config(Strict):
    """Settings."""

    every: Duration = Duration(1.0, "ep")
    data: str = ""
    """Which data set is looked at and trained on."""


class ToySurvey(Objective):
    """Distances of samples from their mean, in a table by id."""

    needs: ClassVar[Mapping[str, str]] = {"image": "uint8[B,3,H,W]"}

    mean: Tensor
    table: Tensor
    first: int

    def __init__(self, config: Config, data: DataFacts) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * data.image_size[0] * data.image_size[1]
        # The dropout would show if the look were not in eval mode.
        self.layer = nn.Sequential(nn.Linear(pixels, WIDTH), nn.Dropout(0.5), nn.Tanh())
        self.head = nn.Linear(pixels, 1)
        samples, self.first = (
            (data.beside[config.data].samples, data.beside[config.data].first) if config.data else (data.samples, 0)
        )
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("table", torch.zeros(samples))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def surveys(self) -> Mapping[str, Survey]:
        return {"distances": Survey(self.config.every, self.config.data)}

    def pixels(self, batch: Batch) -> Tensor:
        return batch["image"].flatten(1).to(self.head.weight.dtype) / 127.5 - 1

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        return {"feature": self.layer(self.pixels(batch)).float()}

    def surveyed(self, survey: str, rows: dict[str, Tensor], ctx: StepContext) -> None:
        total = torch.cat([rows["feature"].double().sum(0), rows["feature"].new_tensor([len(rows["id"])]).double()])
        all_reduce(total)
        self.mean.copy_(total[:-1] / total[-1])
        distance = (rows["feature"] - self.mean).norm(dim=1)
        self.table[gather_ragged(rows["id"]) - self.first] = gather_ragged(distance)
        self.count += 1

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        mine = batch_of(batch, self.config.data)
        pixels = self.pixels(mine)
        wanted = self.table[mine["id"] - self.first]
        keep = ctx.random(mine, "keep").uniform(WIDTH).to(pixels.device) < 0.5
        feature = self.layer[2](self.layer[0](pixels)).float() * keep
        loss = (self.head(pixels).flatten().float() - wanted).square().mean() + (feature - self.mean).square().mean()
        return StepOutput(loss, {"wanted": wanted.mean(), "surveys": self.count.float()})

    @torch.no_grad()
    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        image = batch_of(batch, self.config.data)["image"][0]
        return {"input": Picture(image.permute(1, 2, 0).cpu().numpy(), "a sample")}
