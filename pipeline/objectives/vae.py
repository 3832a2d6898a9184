"""The variational autoencoder: images as codes that are nearly noise, so that noise decodes to images.

Kingma and Welling, "Auto-Encoding Variational Bayes" (ICLR 2014), https://arxiv.org/abs/1312.6114; beta of Higgins et
al. (ICLR 2017); free bits of Kingma et al. 2016 (1606.04934), appendix C.8; the decoder's spread as one learned number:
Rybkin et al. 2021 (2006.13202). Everything is in bits per dimension of the image, so that the loss without beta and
free bits is the bound on its likelihood.
Shape letters: B samples, C channels, H height, W width, D = CHW, Z channels of the code, h and w its height and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.mistakes import validate
from pipeline.config.schema import Strict
from pipeline.core.evaluation import Bits, bits_name
from pipeline.core.protocols import (
    Batch,
    DataFacts,
    Embeddings,
    Export,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.core.random import SampleRandom
from pipeline.dist.collectives import all_reduce, rank_and_world
from pipeline.nn.generative import pixels
from pipeline.nn.generative.autoencoder import Autoencoder, AutoencoderConfig, diffusers_settings, to_diffusers
from pipeline.nn.generative.gaussian import Posterior, importance_weighted
from pipeline.nn.generative.observed import Kind, Observed
from pipeline.nn.images import tile

SHOWN = 8
"""Samples in a row of the showcase."""
ACTIVE = 0.01
"""Nats that a channel's place must tell for it to be in use; far below, the posterior is the prior."""


class Config(Strict):
    """Settings of the autoencoder."""

    network: AutoencoderConfig = AutoencoderConfig()
    channels: Annotated[int, Field(ge=1)] = 3
    decoder: Kind = "logistic"
    """How a value lies around what is decoded: a density of dequantised values, or probabilities of the 256."""
    beta: Annotated[float, Field(ge=0)] = 1.0
    """Weight of what the code tells; 1: the bound."""
    free_bits: Annotated[float, Field(ge=0)] = 0.0
    """Nats that each channel of the code may tell of an image, on average, at no cost."""


class Drawing(Strict):
    """How images are made."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Standard deviation of the codes; the prior's is 1."""


class VAE(PairwiseObjective):
    """Encoder, decoder, and the spread of pixels around what is decoded, one number a channel."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.compares = config, config.free_bits > 0
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"}
        self.image_shape = (config.channels, *facts.image_size)
        self.code_shape = (config.network.latent, *config.network.grid(facts.image_size))
        self.dims = math.prod(self.image_shape)
        self.model = Autoencoder(config.network, config.channels, 2 * config.network.latent)
        self.pixels = Observed(config.decoder, self.image_shape)

    def posterior(self, image: Tensor) -> Posterior:
        """Of uint8[B,C,H,W]."""
        return Posterior.of(self.model.encode(image.float() / 127.5 - 1))

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """ "distortion", bits per dimension, float32[B]; "kl", nats of each channel of the code, float32[B,Z]."""
        own = self.posterior(batch["image"])
        z = own.draw(ctx.random(batch, "vae.code").normal(*self.code_shape))
        likelihood = self.pixels.log_likelihood(
            batch["image"], self.model.decode(z), ctx.random(batch, "vae.dequantise")
        )
        return {
            "distortion": self.pixels.bits(likelihood),
            "kl": own.kl().sum(dim=(2, 3)),
            "code": own.mean.detach().flatten(1),
        }

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Distortion and weighted rate; "bits_per_dim_bound" is the bound, "active" the share of channels in use."""
        distortion, kl = embeddings.rows["distortion"], embeddings.rows["kl"]
        mean = all_reduce(kl.detach().mean(dim=0)) / rank_and_world()[1] if self.compares else kl.detach().mean(dim=0)
        free = self.config.free_bits
        # Below the limit a channel costs the limit, whatever it tells: max(limit, mean over the global batch).
        cost = torch.where(mean > free, kl, torch.full_like(kl, free)) if free else kl
        to_bits = 1 / (self.dims * math.log(2))
        losses = distortion + self.config.beta * to_bits * cost.sum(dim=1)
        rate = to_bits * kl.detach().sum(dim=1)
        places = math.prod(self.code_shape[1:])
        metrics = {
            bits_name("bound"): (distortion.detach() + rate).mean(),
            "distortion": distortion.detach().mean(),
            "rate": rate.mean(),
            "active": (kl.detach().mean(dim=0) > ACTIVE * places).float().mean(),
        }
        return StepOutput(losses.mean(), metrics, losses.detach(), embeddings.rows["code"])

    def encoders(self) -> dict[str, nn.Module]:
        """ "image" is the mean of the posterior; "generator" makes images and bounds their likelihood."""
        return {"image": Means(self), "generator": Generator(self)}

    def exports(self) -> dict[str, Export]:
        """The autoencoder for diffusers; the spread of pixels has no place there."""
        settings = diffusers_settings(self.config.network, self.config.channels, self.image_shape[1:])
        return {
            "diffusers/vae/diffusion_pytorch_model.safetensors": Export(
                to_diffusers(self.model), "diffusers.AutoencoderKL.from_pretrained('FOLDER/vae')"
            ),
            "diffusers/vae/config.json": Export(
                json.dumps(settings | {"_class_name": "AutoencoderKL", "scaling_factor": 1.0}), "its configuration"
            ),
        }

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Images and what is decoded of their codes, samples, and what lies between two images."""
        image = batch["image"][:SHOWN]
        z = self.posterior(image).mean
        ids = torch.arange(2 * SHOWN, device=image.device)
        part = torch.linspace(0, 1, SHOWN, device=z.device).view(-1, 1, 1, 1)
        decoded, between = (self.pixels.image(self.model.decode(code)) for code in (z, torch.lerp(z[:1], z[-1:], part)))
        samples = Generator(self).make(ids, {}, ctx.seed, Drawing())
        return {
            "decoded": Picture(tile([image, decoded]), "Images, and what is decoded of their codes"),
            "samples": Picture(tile(list(samples.split(SHOWN))), "Decoded noise"),
            "between": Picture(tile([between]), "From the code of the first image to that of the last"),
        }


class Means(nn.Module):
    """Images to the mean of their posterior, float32[B,Zhw]. Shares the model."""

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model, self.dim = model, math.prod(model.code_shape)

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to [B,Zhw]."""
        return self.model.posterior(image).mean.flatten(1)


class Generator(nn.Module):
    """Makes images of noise, and says how likely images are; see :class:`pipeline.core.evaluation.Likely`."""

    classes = 0
    told = None

    def __init__(self, model: VAE) -> None:
        super().__init__()
        self.model, self.image_shape = model, model.image_shape

    def settings(self, values: Mapping[str, Any]) -> Drawing:
        """How images are made, from plain values."""
        return validate(Drawing, values, "sampler")

    def make(self, ids: Tensor, prompt: Batch, seed: int, settings: Drawing) -> Tensor:
        """What is decoded of noise that belongs to the ids, without the spread of pixels: uint8[B,C,H,W].

        Raises:
            NonFiniteError: a sample is not finite.
        """
        noise = SampleRandom(seed, "vae.sample", torch.zeros_like(ids), ids).normal(*self.model.code_shape)
        return self.model.pixels.image(self.model.model.decode(settings.temperature * noise), ids)

    def check_likelihood(self, steps: int | None) -> None:
        """Any number of draws."""

    def likelihood(self, image: Tensor, ids: Tensor, prompt: Batch, seed: int, steps: int | None) -> Bits:
        """The bound by one draw, in its two parts; or the importance-weighted bound by ``steps`` draws. float64[B]."""
        own = self.model.posterior(image)
        code = SampleRandom(seed, "vae.code", torch.zeros_like(ids), ids)
        dequantise = SampleRandom(seed, "vae.dequantise", torch.zeros_like(ids), ids)

        def draw() -> tuple[Tensor, Tensor]:
            z = own.draw(code.normal(*self.model.code_shape))
            told = self.model.pixels.log_likelihood(image, self.model.model.decode(z), dequantise)
            return told.double(), z.double()

        if steps is None:
            rate = own.kl().double().flatten(1).sum(dim=1)
            parts = {"distortion": self.model.pixels.bits(draw()[0]), "rate": pixels.bits(-rate, self.model.dims)}
            return Bits("bound", parts)
        wide = Posterior(own.mean.double(), own.log_std.double())
        weights = [told + wide.log_ratio(z) for told, z in (draw() for _ in range(steps))]
        own_bits = self.model.pixels.bits(importance_weighted(torch.stack(weights)))
        return Bits("importance_weighted", {"": own_bits}, steps)
