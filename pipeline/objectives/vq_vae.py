"""The vector-quantised autoencoder: images as maps of numbers of codes, of which few are enough.

Van den Oord et al., "Neural Discrete Representation Learning" (NeurIPS 2017), https://arxiv.org/abs/1711.00937; the
quantisers are in :mod:`pipeline.nn.generative.codebook`, each with its source. With a critic of what is decoded it is
VQGAN (Esser et al. 2021, 2012.09841): each step moves the autoencoder and then the critic. Everything is in bits per
dimension of the image: the distortion is the decoder's likelihood, so that with the rate of codes that are all as
likely it is a bound, which a prior over the codes makes smaller.
Shape letters: B samples, C channels, H height, W width, D = CHW, Z channels of the code, h and w its height and width,
K codes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.evaluation import bits_name
from pipeline.core.protocols import Batch, Clock, DataFacts, Export, Objective, Picture, StepContext, StepOutput
from pipeline.dist.gather import gather_ragged
from pipeline.nn.generative.adversary import Adversary, AdversaryConfig
from pipeline.nn.generative.autoencoder import Autoencoder, diffusers_settings, to_diffusers
from pipeline.nn.generative.codebook import Codebook, CodesConfig, Quantised, Scalars, perplexity
from pipeline.nn.generative.observed import Kind, Observed
from pipeline.nn.images import tile

SHOWN = 8
"""Samples in a row of the showcase."""
DEAD = 0.01
"""A code that stands for fewer places of a step, on average, is dead."""


class Config(CodesConfig):
    """Settings; the defaults are the paper's, with codes as moving averages."""

    channels: Annotated[int, Field(ge=1)] = 3
    decoder: Kind = "logistic"
    commitment: Annotated[float, Field(ge=0)] = 0.25
    """Weight of the encoder's distance to its codes."""
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Of moving averages: codes, and how often each is used."""
    revive: Annotated[float, Field(ge=0)] = 0.0
    """Codes that stand for fewer places of a step, on average, start anew from what the encoder gives; 0: none does."""
    critic: AdversaryConfig | None = None
    """Of what is decoded; left out: none."""

    @model_validator(mode="after")
    def _fits(self) -> Config:
        if self.revive and self.quantiser != "average":
            raise ValueError('"revive" is of codes that are moving averages: set quantiser = "average", or revive = 0')
        return self


class VQVAE(Objective):
    """Encoder, quantiser, decoder, and the spread of pixels around what is decoded."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.needs = {"image": f"uint8[B,{config.channels},H,W]"}
        self.image_shape = (config.channels, *facts.image_size)
        self.code_shape = (config.network.latent, *config.network.grid(facts.image_size))
        self.model = Autoencoder(config.network, config.channels, config.network.latent)
        self.quantiser: Codebook | Scalars
        if config.quantiser == "scalar":
            self.quantiser = Scalars(config.levels)
        else:
            self.quantiser = Codebook(
                config.codes,
                config.network.latent,
                commitment=config.commitment,
                decay=config.decay if config.quantiser == "average" else None,
                cosine=config.cosine,
                revive=config.revive,
            )
        self.pixels = Observed(config.decoder, self.image_shape)
        self._candidates: list[tuple[Tensor, Tensor]] = []
        self.critic = None
        if config.critic is not None:
            self.critic = Adversary(config.critic, facts.image_size, config.channels)

    def phases(self) -> Mapping[str, Sequence[str]]:
        """With a critic, the autoencoder first."""
        return (
            {} if self.critic is None else {"autoencoder": ["model.", "quantiser.", "pixels."], "critic": ["critic."]}
        )

    def encode(self, image: Tensor) -> tuple[Tensor, Quantised]:
        """What the encoder says of uint8[B,C,H,W], [B,Z,h,w], and its codes."""
        x = self.model.encode(image.float() / 127.5 - 1)
        return x, self.quantiser(x)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Distortion and what codes cost; "perplexity" and "dead" are of the codes of the last updates."""
        if ctx.phase == "critic":
            return self._critics(batch, ctx)
        x, own = self.encode(batch["image"])
        decoded = self.model.decode(own.z)
        likelihood = self.pixels.log_likelihood(batch["image"], decoded, ctx.random(batch, "vq_vae.dequantise"))
        distortion = self.pixels.bits(likelihood)
        losses = distortion + own.losses
        if ctx.training and self.training:
            self.quantiser.note(x, own.index)
            self._propose(x.detach(), batch, ctx)
        rate = math.prod(self.code_shape[1:]) * math.log2(self.quantiser.codes) / self.pixels.dims
        metrics = {
            "distortion": distortion.detach().mean(),
            bits_name("bound"): distortion.detach().mean() + rate,
            "perplexity": perplexity(self.quantiser.counts),
            "dead": (self.quantiser.counts < DEAD).float().mean(),
        }
        if self.critic is not None:
            adversarial = self.critic.heard(decoded, distortion, self.model.decoder.conv_out.weight, ctx.clock)
            losses = losses + adversarial
            metrics |= {"adversarial": adversarial.detach().mean(), "ratio": self.critic.ratio[0].float()}
        return StepOutput(losses.mean(), metrics, losses.detach(), own.z.detach().flatten(1))

    def _critics(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """The critic's loss, on images and what the autoencoder, just moved, makes of them."""
        assert self.critic is not None
        with torch.no_grad():
            decoded = self.model.decode(self.encode(batch["image"])[1].z)
        losses, metrics = self.critic.judged(batch["image"].to(decoded.dtype) / 127.5 - 1, decoded, ctx.clock)
        return StepOutput(losses.mean(), metrics, losses.detach())

    def _propose(self, x: Tensor, batch: Batch, ctx: StepContext) -> None:
        """One place of each sample, that dead codes may be started anew from."""
        if not self.config.revive:
            return
        rows = x.flatten(2)
        place = ctx.random(batch, "vq_vae.place").integers(0, rows.shape[2], 1)
        lot = ctx.random(batch, "vq_vae.lot").integers(0, 2**31, 1)[:, 0]
        found = rows.gather(2, place[:, None].expand(-1, rows.shape[1], -1))[:, :, 0]
        self._candidates.append((torch.stack([lot, batch["id"]], dim=1), found))

    def after_step(self, clock: Clock) -> None:
        """Codes and counts move by what all ranks have seen in this update."""
        candidates = torch.empty(0, self.code_shape[0])
        if self._candidates:
            keys, rows = (gather_ragged(torch.cat(parts)) for parts in zip(*self._candidates, strict=True))
            drawn = sorted(range(len(keys)), key=keys.tolist().__getitem__)  # by lot, the same on all ranks
            candidates, self._candidates = rows[drawn], []
        self.quantiser.learn(candidates, self.config.decay)
        if self.critic is not None:
            self.critic.learn()

    def encoders(self) -> dict[str, nn.Module]:
        """The codes of an image, side by side."""
        return {"image": Codes(self)}

    def exports(self) -> dict[str, Export]:
        """The autoencoder for diffusers, which knows learned codes by their distance."""
        weights = "diffusers/vqvae/diffusion_pytorch_model.safetensors"
        if not isinstance(self.quantiser, Codebook) or self.config.cosine:
            return {weights: Export(None, 'not written: diffusers has neither "scalar" nor "cosine"')}
        settings = diffusers_settings(self.config.network, self.config.channels, self.image_shape[1:]) | {
            "_class_name": "VQModel",
            "num_vq_embeddings": self.quantiser.codes,
            "vq_embed_dim": self.config.network.latent,
        }
        codes = {"quantize.embedding.weight": self.quantiser.table().detach()}
        return {
            weights: Export(to_diffusers(self.model) | codes, "diffusers.VQModel.from_pretrained('FOLDER/vqvae')"),
            "diffusers/vqvae/config.json": Export(json.dumps(settings), "its configuration"),
        }

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Images, the numbers of their codes as greys, and what is decoded of them."""
        image = batch["image"][:SHOWN]
        _, own = self.encode(image)
        grey = (own.index.float() / max(1, self.quantiser.codes - 1) * 255).round().to(torch.uint8)
        codes = functional.interpolate(grey[:, None], image.shape[-2:]).expand_as(image)
        rows = [image, codes, self.pixels.image(self.model.decode(own.z))]
        return {"decoded": Picture(tile(rows), "Images, the numbers of their codes, and what is decoded of them")}


class Codes(nn.Module):
    """Images to their codes, float32[B,Zhw]. Shares the model."""

    def __init__(self, model: VQVAE) -> None:
        super().__init__()
        self.model, self.dim = model, math.prod(model.code_shape)

    def forward(self, image: Tensor) -> Tensor:
        """uint8[B,C,H,W] to [B,Zhw]."""
        return self.model.encode(image)[1].z.flatten(1)
