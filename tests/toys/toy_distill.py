"""A frozen part: a student that follows a teacher from a file.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531), with squared errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from pipeline.config.schema import Strict
from pipeline.core.protocols import Batch, DataFacts, Objective, Origin, Picture, StepContext, StepOutput

WIDTH = 4


class Config(Strict):
    """Settings."""

    teacher: str = "teacher.safetensors"
    sha256: str | None = None


class Tower(nn.Module):
    """One layer on pixels, and a normalization, which would drift if it were not in eval mode."""

    dim = WIDTH

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, image: Tensor) -> Tensor:
        pixels = image.flatten(1).to(self.layer.weight.dtype) / 127.5 - 1
        return self.norm(self.layer(pixels))


class ToyDistill(Objective):
    """The mean squared difference from the teacher's features."""

    needs: ClassVar[Mapping[str, str]] = {"image": "uint8[B,3,H,W]"}

    def __init__(self, config: Config, data: DataFacts) -> None:
        super().__init__()
        self.config = config
        pixels = 3 * data.image_size[0] * data.image_size[1]
        self.teacher = Tower(pixels).requires_grad_(False)
        self.student = Tower(pixels)
        self.student.norm = nn.LayerNorm(WIDTH)

    def frozen(self) -> Mapping[str, Origin]:
        return {"teacher": Origin(self.config.teacher, self.config.sha256)}

    def encoders(self) -> dict[str, nn.Module]:
        return {"image": self.student}

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        wanted = self.teacher(batch["image"]).float()
        losses = (self.student(batch["image"]).float() - wanted).square().mean(dim=1)
        return StepOutput(losses.mean(), {"teacher_norm": wanted.norm(dim=1).mean()}, losses.detach())

    @torch.no_grad()
    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        return {"input": Picture(batch["image"][0].permute(1, 2, 0).cpu().numpy(), "what both see")}
