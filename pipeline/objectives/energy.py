"""An energy of images, learned by denoising score matching at several noise levels; Langevin dynamics make images.

Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution" (NeurIPS 2019),
https://arxiv.org/abs/1907.05600, with the gradient of one number in place of a network of scores (Salimans and Ho
2021); the mathematics are in :mod:`pipeline.nn.generative.energy`. Weighted by the noise level's square, the loss is
the squared error of the noise, as DDPM's: sigma times the energy's gradient is what a denoiser says the noise was.
Shape letters: B samples, C channels, H height, W width, L noise levels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.mistakes import validate
from pipeline.config.strict import Positive, PositiveFloat, Strict
from pipeline.core.errors import NonFiniteError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.core.random import SampleRandom
from pipeline.nn.diffusion.space import to_model, to_pixels
from pipeline.nn.dropout import dropping_for
from pipeline.nn.generative.energy import Energy, LangevinConfig, each, geometric, langevin
from pipeline.nn.images import tile
from pipeline.nn.unet import UNet, UNetConfig

SHOWN = 8
"""Samples in a row of the showcase."""
FEATURES = "middle_1"
"""Block whose output is the image's features."""


class Config(Strict):
    """Settings; the defaults are Song and Ermon's noise levels, for images from -1 to 1 instead of 0 to 1."""

    network: UNetConfig = UNetConfig()
    channels: Positive = 3
    """C."""
    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat = 2.0
    levels: Annotated[int, Field(ge=2)] = 10
    """L, each the same part of the one before."""
    sampler: LangevinConfig = LangevinConfig()
    """Of the showcase, and of evaluations that do not say otherwise."""

    @model_validator(mode="after")
    def _rising(self) -> Config:
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"sigma_max = {self.sigma_max:g} must be larger than sigma_min = {self.sigma_min:g}")
        return self


class EnergyModel(Objective):
    """The energy and how it is trained."""

    second_order = True

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"}
        self.image_shape = (config.channels, *facts.image_size)
        network = UNet(config.network, facts.image_size, channels=config.channels, out=config.channels)
        self.energy = Energy(network, config.sigma_min, config.sigma_max)
        self.sigmas = geometric(config.sigma_min, config.sigma_max, config.levels)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Mean squared error of the noise; "loss_q0" to "loss_q3" are its means over quarters of the levels.

        The largest levels come first, and a quarter's mean is four times the mean of what falls into it, as DDPM's.
        """
        place, noise, x, sigma = self.noised(batch, ctx)
        with dropping_for(batch, ctx) if ctx.training else nullcontext():
            score = self.energy.score(x, sigma)
        losses = (each(sigma, score) * score + noise).square().flatten(1).mean(dim=1).float()
        quarter = (4 * place).long()
        metrics = {f"loss_q{q}": 4 * losses.detach().where(quarter == q, 0.0).mean() for q in range(4)}
        return StepOutput(losses.mean(), metrics, losses.detach())

    def noised(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of a batch: each sample's place among the levels, from 0 to 1, its noise, noised image, and level."""
        place = ctx.random(batch, "energy.level").uniform(1)[:, 0]
        noise = ctx.random(batch, "energy.noise").normal(*batch["image"].shape[1:])
        sigma = self.sigmas.to(place.device)[(place * len(self.sigmas)).long()]
        clean = to_model(batch["image"])
        return place, noise, clean + each(sigma, clean) * noise, sigma

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" is a block's output at the smallest noise level; "generator" makes images."""
        return {"image": EnergyFeatures(self.energy), "generator": EnergyMaker(self)}

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and with its noise."""
        return {"image": batch["image"], "noised": to_pixels(self.noised(batch, ctx)[2])}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Samples of the same noise every time, and images with their noise and as they are expected to be without."""
        was_training = self.training
        self.eval()
        few = {name: value[:SHOWN] for name, value in batch.items()}
        _, _, x, sigma = self.noised(few, ctx)
        expected = x + each(sigma**2, x) * self.energy.score(x, sigma)
        ids = torch.arange(2 * SHOWN, device=x.device)
        samples = EnergyMaker(self).make(ids, {}, ctx.seed, self.config.sampler)
        self.train(was_training)
        rows = [few["image"], to_pixels(x), to_pixels(expected)]
        return {
            "samples": Picture(tile(list(samples.split(SHOWN))), "Samples, of the same noise every time"),
            "denoised": Picture(tile(rows), "Images, with noise, and as expected of them"),
        }


class EnergyFeatures(nn.Module):
    """Images to the mean over places of what a block gives, at the smallest noise level. Shares the energy."""

    def __init__(self, energy: Energy) -> None:
        super().__init__()
        self.energy, self.dim = energy, energy.network.taps[FEATURES]

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to at least float32[B,D]."""
        sigma = torch.full((len(image),), self.energy.low, dtype=torch.float64, device=image.device)
        x = self.energy.scaled(to_model(image), sigma)
        walk = self.energy.network.walk(x, self.energy.conditions(sigma))
        h = next(h for name, h in walk if name == FEATURES)
        return h.to(torch.promote_types(h.dtype, torch.float32)).mean(dim=(2, 3))


class EnergyMaker(nn.Module):
    """Makes images; see :class:`pipeline.core.evaluation.Maker`. Shares the energy."""

    classes = 0
    told = None

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model

    def settings(self, values: Mapping[str, Any]) -> LangevinConfig:
        """How images are made, from plain values; {}: as in the showcase."""
        return validate(LangevinConfig, values, "sampler") if values else self.model.config.sampler

    @torch.no_grad()
    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: LangevinConfig) -> Tensor:
        """Images of noise that belongs to the ids: uint8[B,C,H,W].

        Raises:
            NonFiniteError: a sample is not finite.
        """
        random = SampleRandom(seed, "energy.sample", torch.zeros_like(ids), ids)
        shape, sigmas = self.model.image_shape, self.model.sigmas
        start = float(sigmas[0]) * random.normal(*shape)
        x = langevin(start, sigmas, self.model.energy.score, lambda: random.normal(*shape), settings)
        if not x.isfinite().all():
            bad = ids[~x.flatten(1).isfinite().all(dim=1)].tolist()
            raise NonFiniteError(
                f"sample {bad[0]} (one of {len(bad)}) is not finite; the energy has diverged, or sampler.step is too "
                "large"
            )
        return to_pixels(x)
