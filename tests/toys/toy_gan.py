"""Two phases: a generator and a critic, each of two layers, with the logistic loss.

Goodfellow et al., "Generative Adversarial Nets" (2014, arXiv 1406.2661), section 3, non-saturating.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from pipeline.config.schema import Strict
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput

LATENT, WIDTH = 4, 16


class Config(Strict):
    """Settings."""

    limit: float | None = None
    """Largest weight of the critic (WGAN, arXiv 1701.07875)."""


class ToyGAN(Objective):
    """Real images, and those of a generator, told apart."""

    needs: ClassVar[Mapping[str, str]] = {"image": "uint8[B,3,H,W]"}

    def __init__(self, config: Config, data: DataFacts) -> None:
        super().__init__()
        self.config, self.size = config, data.image_size
        pixels = 3 * data.image_size[0] * data.image_size[1]
        self.generator = nn.Sequential(nn.Linear(LATENT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, pixels), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(pixels, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def phases(self) -> Mapping[str, Sequence[str]]:
        return {"generator": ["generator."], "critic": ["critic."]}

    def limits(self) -> Mapping[str, tuple[float, float]]:
        if self.config.limit is None:
            return {}
        names = [name for name, _ in self.named_parameters() if name.startswith("critic.")]
        return dict.fromkeys(names, (-self.config.limit, self.config.limit))

    def fake(self, batch: Batch, ctx: StepContext) -> Tensor:
        return self.generator(ctx.random(batch, "latent").normal(LATENT).to(self.generator[0].weight.dtype))

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        fake = self.critic(self.fake(batch, ctx)).flatten()
        if ctx.phase == "generator":
            loss = softplus(-fake.float()).mean()
            return StepOutput(loss, {"fooled": (fake > 0).float().mean()})
        image = batch["image"].flatten(1).to(self.critic[0].weight.dtype) / 127.5 - 1
        real = self.critic(image).flatten()
        # The images are not detached: the engine keeps the gradient out of the generator.
        loss = (softplus(fake.float()) + softplus(-real.float())).mean()
        return StepOutput(loss, {"real": real.detach().float().mean(), "fake": fake.detach().float().mean()})

    @torch.no_grad()
    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        pixels = self.fake(batch, ctx)[0].float().view(3, *self.size).mul(127.5).add(127.5)
        return {"fake": Picture(pixels.permute(1, 2, 0).to(torch.uint8).cpu().numpy(), "made of noise")}
