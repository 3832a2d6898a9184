"""Generative adversarial networks: a generator that makes images of noise, and a critic that tells them from data.

Goodfellow et al., "Generative Adversarial Nets" (NeurIPS 2014), https://arxiv.org/abs/1406.2661; networks and spectral
normalisation of Miyato et al. 2018 (1802.05957), classes by projection of Miyato and Koyama 2018 (1802.05637); losses
and penalties in :mod:`pipeline.nn.generative.adversarial`, each with its source. The critic's features as an encoder:
Radford et al. 2016 (1511.06434), section 5.1.
Each step moves the critic, ``phases.critic.updates`` times, and then the generator. All see the step's batch; ``parts``
shares it out. The averaged generator (Yazici et al. 2019, 1806.04498) is that of ``[ema]``.
Shape letters: B samples, C channels, H height, W width, Z latent numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.mistakes import validate
from pipeline.config.strict import Positive, Strict
from pipeline.core.errors import ConfigError, NonFiniteError
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.core.random import SampleRandom
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.diffusion.space import to_model, to_pixels
from pipeline.nn.generative.adversarial import Kind, PenaltyConfig, critic_loss, generator_loss, penalty, unlike
from pipeline.nn.generative.critics import (
    CriticConfig,
    CriticFeatures,
    PatchCriticConfig,
    ResNetCriticConfig,
    critic_of,
    pooled,
)
from pipeline.nn.generative.generators import Generator, GeneratorConfig
from pipeline.nn.generative.spectral import follow
from pipeline.nn.images import tile
from pipeline.nn.labels import check_labels

SHOWN = 8
"""Samples in a row of the showcase."""


class Config(Strict):
    """Settings; the defaults are SNGAN's for CIFAR-10."""

    generator: GeneratorConfig = GeneratorConfig()
    critic: CriticConfig = ResNetCriticConfig()
    channels: Positive = 3
    """C."""
    loss: Kind = "hinge"
    penalty: PenaltyConfig | None = None
    """On the critic's gradient; left out: none."""
    condition: Literal["none", "class"] = "none"
    parts: Positive = 1
    """That a batch is cut into: update n of a phase sees part n, and the generator's one update the first. With as many
    as the critic makes updates, none of those in a step sees an image that another has seen, as in the papers; 1: all
    see the whole batch."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.penalty is not None and isinstance(self.critic, PatchCriticConfig) and self.critic.norm:
            raise ValueError(
                "a penalty is on the critic's gradient for each image by itself, and batch norm mixes them; set "
                "critic.norm = false"
            )
        return self


class Drawing(Strict):
    """How images are made."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the noise; in training it is 1."""


class GAN(Objective):
    """Generator and critic."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        if config.condition == "class" and not facts.classes:
            raise ConfigError(
                'objective.condition = "class": the data set has no classes; build it from a source with labels, or '
                'set condition = "none"'
            )
        self.config = config
        self.classes = facts.classes if config.condition == "class" else ()
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"} | ({"label": "int64[B]"} if self.classes else {})
        size, classes = facts.image_size, len(self.classes)
        self.generator = Generator(config.generator, size, config.channels, classes)
        self.critic = critic_of(config.critic, size, config.channels, classes)
        self._labels_checked = False

    def phases(self) -> Mapping[str, Sequence[str]]:
        """The critic first."""
        return {"critic": ["critic."], "generator": ["generator."]}

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """The loss of a phase.

        "real" and "fake" are the critic's mean scores. "unlike_real" and "unlike_fake" are mean squared distances
        between features of two images: where samples are much more alike than data, the generator has collapsed.
        """
        own, whole = self._part(batch, ctx), self.config.parts == 1
        label = own.get("label") if self.classes else None
        if label is not None and not self._labels_checked:  # once: it waits for the device
            check_labels(label, self.classes)
            self._labels_checked = True
        noise = ctx.random(own, f"gan.noise.{ctx.phase}").normal(self.config.generator.latent)
        if ctx.phase == "generator":
            scores = self.critic(self.generator(noise, label), label).scores
            losses = generator_loss(self.config.loss, scores).float()
            metrics = {"fake": scores.detach().float().mean()}
            return StepOutput(losses.mean(), metrics, losses.detach() if whole else None)
        real = to_model(own["image"])
        with torch.no_grad(), frozen_statistics(self.generator):
            fake = self.generator(noise, label)
        real = real.to(fake.dtype)
        of_real, of_fake = (self.critic(x, label) for x in (real, fake))  # apart: a batch norm must not mix them
        losses = critic_loss(self.config.loss, of_real.scores, of_fake.scores)
        metrics = {"real": of_real.scores.detach().float().mean(), "fake": of_fake.scores.detach().float().mean()}
        if self.config.penalty is not None:
            part = ctx.random(own, "gan.between").uniform(1)[:, 0]
            extra = penalty(self.config.penalty, lambda x: self.critic(x, label).scores, real, fake, part)
            metrics["penalty"] = extra.detach().float().mean()
            losses = losses + extra
        losses = losses.float()
        features = pooled(of_real.maps).detach()
        metrics["unlike_real"] = unlike(features).float()
        metrics["unlike_fake"] = unlike(pooled(of_fake.maps).detach()).float()
        return StepOutput(losses.mean(), metrics, losses.detach() if whole else None, features)

    def _part(self, batch: Batch, ctx: StepContext) -> Batch:
        """What an update sees: every ``parts``-th sample, so that micro-batches and ranks are cut as the whole is."""
        parts = self.config.parts
        if len(batch["id"]) % parts:
            raise ConfigError(
                f"objective.parts = {parts} does not divide a micro-batch of {len(batch['id'])} samples; set "
                f"engine.micro_batch to a multiple of {parts}"
            )
        return {name: value[ctx.repeat % parts :: parts] for name, value in batch.items()}

    def after_step(self, clock: Clock) -> None:
        """Singular vectors follow the critic's weights."""
        follow(self.critic)

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" are the critic's features; "generator" makes images."""
        return {"image": CriticFeatures(self.critic), "generator": GANMaker(self)}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Samples of the same noise every time, classes in turn, and what lies between two of them."""
        was_training = self.training
        self.eval()
        device = batch["image"].device
        ids, maker = torch.arange(4 * SHOWN, device=device), GANMaker(self)
        prompt = {"label": ids % len(self.classes)} if self.classes else {}
        samples = maker.make(ids, prompt, ctx.seed, Drawing())
        ends = maker.noise(ids[:2], ctx.seed)
        part = torch.linspace(0, 1, SHOWN, device=device).view(-1, 1)
        label = torch.zeros_like(ids[:SHOWN]) if self.classes else None
        between = to_pixels(self.generator(torch.lerp(ends[:1], ends[1:], part), label))
        self.train(was_training)
        return {
            "samples": Picture(tile(list(samples.split(SHOWN))), "Samples, of the same noise every time"),
            "between": Picture(tile([between]), "From the noise of the first sample to that of the second"),
        }


class GANMaker(nn.Module):
    """Makes images; see :class:`pipeline.core.evaluation.Maker`. Shares the generator."""

    def __init__(self, model: GAN) -> None:
        super().__init__()
        self.model, self.classes = model, len(model.classes)
        self.told: Literal["label"] | None = "label" if model.classes else None

    def settings(self, values: Mapping[str, Any]) -> Drawing:
        """How images are made, from plain values."""
        return validate(Drawing, values, "sampler")

    def noise(self, ids: Tensor, seed: int) -> Tensor:
        """That belongs to the ids: float32[B,Z]."""
        random = SampleRandom(seed, "gan.sample", torch.zeros_like(ids), ids)
        return random.normal(self.model.config.generator.latent)

    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: Drawing) -> Tensor:
        """Images of noise that belongs to the ids: uint8[B,C,H,W].

        Raises:
            NonFiniteError: a sample is not finite.
        """
        x = self.model.generator(settings.temperature * self.noise(ids, seed), prompt.get("label"))
        if not x.isfinite().all():
            bad = ids[~x.flatten(1).isfinite().all(dim=1)].tolist()
            raise NonFiniteError(f"sample {bad[0]} (one of {len(bad)}) is not finite; the generator has diverged")
        return to_pixels(x)
