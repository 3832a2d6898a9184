"""Super-resolution and inpainting by an adversary: a network restores images, a critic tells them from whole ones.

Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network" (CVPR 2017),
https://arxiv.org/abs/1609.04802; Pathak et al., "Context Encoders: Feature Learning by Inpainting" (CVPR 2016,
1604.07379). No features of another network are compared, but those of the critic may be: Wang et al. 2018 (1711.11585),
section 3.2. Task and network are in :mod:`pipeline.nn.generative.restoring`, losses in
:mod:`pipeline.nn.generative.adversarial`. Each step moves the critic and then the restorer, on the same batch.
Shape letters: B samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.strict import Positive, Strict
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.core.random import SampleRandom
from pipeline.nn.diffusion.space import to_model, to_pixels
from pipeline.nn.generative.adversarial import critic_loss, generator_loss, silent
from pipeline.nn.generative.critics import ConvCriticConfig, CriticConfig, CriticFeatures, Judged, critic_of, pooled
from pipeline.nn.generative.restoring import (
    Degraded,
    DownscaleConfig,
    Restorer,
    RestorerConfig,
    TaskConfig,
    check_task,
    degrade,
)
from pipeline.nn.generative.spectral import follow
from pipeline.nn.image_quality import psnr
from pipeline.nn.images import tile

SHOWN = 8
"""Samples in a row of the showcase."""


class Config(Strict):
    """Settings; the weights are SRGAN's."""

    task: TaskConfig = DownscaleConfig()
    restorer: RestorerConfig = RestorerConfig()
    critic: CriticConfig = ConvCriticConfig()
    channels: Positive = 3
    """C."""
    loss: Literal["non_saturating", "hinge"] = "non_saturating"
    pixel: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the mean absolute error of what is restored, on the scale from -1 to 1."""
    adversarial: Annotated[float, Field(ge=0)] = 1e-3
    """Weight of the critic."""
    features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the mean absolute error of the critic's features."""
    start: Annotated[int, Field(ge=0)] = 0
    """Updates before the critic is trained and heard."""


class RestorationGAN(Objective):
    """Restorer and critic."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        check_task(config.task, facts.image_size)
        self.config = config
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"}
        self.restorer = Restorer(config.restorer, config.task, facts.image_size, config.channels)
        self.critic = critic_of(config.critic, facts.image_size, config.channels)

    def phases(self) -> Mapping[str, Sequence[str]]:
        """The critic first."""
        return {"critic": ["critic."], "restorer": ["restorer."]}

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """The loss of a phase; "psnr" is of what is restored, "psnr_given" of plain upscaling or of grey, in dB."""
        image, own = to_model(batch["image"]), self.degraded(batch, ctx)
        begun = ctx.clock.step >= self.config.start
        if ctx.phase == "restorer":
            return self._restorers(batch["image"], image, own, begun)
        with torch.no_grad():
            restored = self.restorer(own)
        real, fake = self.critic(image.to(restored.dtype)), self.critic(restored)
        means = {name: said.scores.detach().float().mean() for name, said in (("real", real), ("fake", fake))}
        losses = critic_loss(self.config.loss, real.scores, fake.scores).float()
        if not begun:
            losses = silent(self.critic, len(image))
        return StepOutput(losses.mean(), means, losses.detach(), pooled(real.maps).detach())

    def _restorers(self, pixels: Tensor, image: Tensor, own: Degraded, begun: bool) -> StepOutput:
        restored = self.restorer(own)
        # What is seen adds nothing; every sample hides as much.
        share = own.hidden.float().mean()
        losses = self.config.pixel * (restored - image).abs().flatten(1).mean(dim=1) / share
        metrics = {"pixel": losses.detach().float().mean()}
        if begun:
            judged = self.critic(restored)
            adversarial = self.config.adversarial * generator_loss(self.config.loss, judged.scores)
            if self.config.features:
                adversarial = adversarial + self.config.features * self._apart(judged, image.to(restored.dtype))
            losses = losses + adversarial
        metrics["adversarial"] = losses.detach().float().mean() - metrics["pixel"]
        metrics["psnr"] = psnr(pixels, to_pixels(restored.detach())).mean()
        metrics["psnr_given"] = psnr(pixels, to_pixels(own.base)).mean()
        losses = losses.float()
        return StepOutput(losses.mean(), metrics, losses.detach())

    def _apart(self, judged: Judged, image: Tensor) -> Tensor:
        """Mean absolute error of the critic's maps, the mean over maps: [B]."""
        with torch.no_grad():
            whole = self.critic.maps(image)
        apart = [(a - b).abs().flatten(1).mean(dim=1) for a, b in zip(judged.maps, whole, strict=True)]
        return torch.stack(apart).mean(dim=0)

    def degraded(self, batch: Batch, ctx: StepContext) -> Degraded:
        """What is left of the images of a batch."""
        return degrade(self.config.task, batch["image"], ctx.random(batch, "restoration.mask"))

    def after_step(self, clock: Clock) -> None:
        """Singular vectors follow the critic's weights."""
        follow(self.critic)

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" are the critic's features; "restorer" is measured by the evaluation "restoration"."""
        return {"image": CriticFeatures(self.critic), "restorer": Restoring(self)}

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and the answer without a network."""
        return {"image": batch["image"], "given": to_pixels(self.degraded(batch, ctx).base)}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Images, what is given of them, and what is made of that, with their PSNR."""
        few = {name: value[:SHOWN] for name, value in batch.items()}
        own = self.degraded(few, ctx)
        given, restored = to_pixels(own.base), to_pixels(self.restorer(own))
        before, after = (float(psnr(few["image"], x).mean()) for x in (given, restored))
        caption = f"Images, what is given of them ({before:.2f} dB), and restored ({after:.2f} dB)"
        return {"restored": Picture(tile([few["image"], given, restored]), caption)}


class Restoring(nn.Module):
    """Takes something away from images and restores it; see :mod:`pipeline.evals.restoration`. Shares the network."""

    def __init__(self, model: RestorationGAN) -> None:
        super().__init__()
        self.restorer, self.task = model.restorer, model.config.task

    def forward(self, image: Tensor, ids: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """uint8[B,C,H,W] and int64[B] to what is given, as an image, and what is made of it: uint8[B,C,H,W] each."""
        own = degrade(self.task, image, SampleRandom(seed, "restoration.mask", torch.zeros_like(ids), ids))
        return to_pixels(own.base), to_pixels(self.restorer(own))
