"""A critic of what an autoencoder decodes, whose weight follows from the gradients that it and the distortion make.

Esser et al., "Taming Transformers for High-Resolution Image Synthesis" (CVPR 2021, arXiv 2012.09841), eq. 7: VQGAN.
The weight is a ratio of norms, so that it is no mean over samples: taken within a forward, it would depend on how many
ranks and micro-batches a batch is spread over. Here both gradients are added up over all of them, and the ratio is that
of the last update.
Shape letters: B samples, C channels, H height, W width, P places that are judged.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.strict import Strict
from pipeline.core.protocols import Clock
from pipeline.dist.collectives import all_reduce, rank_and_world
from pipeline.nn.generative.adversarial import critic_loss, generator_loss, silent
from pipeline.nn.generative.critics import CriticConfig, PatchCriticConfig, critic_of
from pipeline.nn.generative.spectral import follow

SMALL, LARGEST = 1e-4, 1e4
"""Added to the norm that is divided by, and the largest ratio (the paper's code)."""


class AdversaryConfig(Strict):
    """Settings; the defaults are VQGAN's."""

    network: CriticConfig = PatchCriticConfig()
    loss: Literal["hinge", "non_saturating"] = "hinge"
    weight: Annotated[float, Field(ge=0)] = 0.8
    """Of the ratio of both gradients."""
    start: Annotated[int, Field(ge=0)] = 0
    """Updates before the critic is trained and heard."""


class Adversary(nn.Module):
    """The critic and its weight.

    Args:
        config: settings.
        image_size: height and width.
        channels: C.

    Raises:
        ConfigError: images that do not fit the critic.
    """

    ratio: Tensor
    """float32[1], of the norms of both gradients; 0 until they are known."""

    def __init__(self, config: AdversaryConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        self.config = config
        self.critic = critic_of(config.network, image_size, channels)
        self.register_buffer("ratio", torch.zeros(1))
        self._fresh: list[Tensor] = []

    def begun(self, clock: Clock) -> bool:
        """Whether it is trained and heard."""
        return clock.step >= self.config.start

    def heard(self, decoded: Tensor, distortion: Tensor, last: nn.Parameter, clock: Clock) -> Tensor:
        """What the autoencoder loses by the critic, with its weight, float32[B].

        Args:
            decoded: float[B,C,H,W], about -1 to 1, with a gradient.
            distortion: [B].
            last: the weight of the last layer; gradients with respect to it are compared.
            clock: of the step.
        """
        if not self.begun(clock):
            return torch.zeros_like(distortion)
        losses = generator_loss(self.config.loss, self.critic(decoded).scores)
        if self.training and torch.is_grad_enabled() and last.requires_grad:
            both = [torch.autograd.grad(loss.mean(), last, retain_graph=True)[0] for loss in (distortion, losses)]
            self._fresh.append(torch.stack(both).float())
        return self.config.weight * self.ratio.float() * losses

    def judged(self, image: Tensor, decoded: Tensor, clock: Clock) -> tuple[Tensor, dict[str, Tensor]]:
        """What the critic loses, [B], half of it for images and half for what is decoded; and its mean scores."""
        if not self.begun(clock):
            zero = torch.zeros((), device=image.device)
            return silent(self.critic, len(image)), {"real": zero, "fake": zero}
        real, fake = (self.critic(x).scores for x in (image, decoded.detach()))
        means = {name: scores.detach().float().mean() for name, scores in (("real", real), ("fake", fake))}
        return critic_loss(self.config.loss, real, fake) / 2, means

    @torch.no_grad()
    def learn(self) -> None:
        """Once per step: the ratio of both gradients, over all micro-batches and ranks."""
        follow(self.critic)
        if not self._fresh:
            return
        whole = all_reduce(torch.stack(self._fresh).mean(dim=0)) / rank_and_world()[1]
        self._fresh = []
        distortion, adversarial = whole.flatten(1).norm(dim=1)
        self.ratio.fill_(0).add_((distortion / (adversarial + SMALL)).clamp(0, LARGEST))
