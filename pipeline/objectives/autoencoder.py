"""Autoencoders: plain, sparse, denoising and contractive.

An encoder makes a code of the image, a decoder the image of the code. Denoising: Vincent et al., "Extracting and
Composing Robust Features with Denoising Autoencoders" (ICML 2008). Sparse by the Kullback-Leibler divergence of the
mean activations: Ng, "Sparse Autoencoder" (CS294A lecture notes, 2011). Contractive: Rifai et al., "Contractive
Auto-Encoders" (ICML 2011), the norm of the Jacobian by finite differences as in Alain and Bengio, "What Regularized
Auto-Encoders Learn from the Data Generating Distribution" (JMLR 2014). Inpainting is MAE's machinery.
Shape letters: B samples, C channels, H height, W width, D width of the encoder, which is the code's.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from pipeline.config.strict import PositiveFloat
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import (
    Batch,
    DataFacts,
    Embeddings,
    PairwiseObjective,
    Picture,
    StepContext,
    StepOutput,
)
from pipeline.dist.collectives import global_mean, wide
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.construct import construct_encoder
from pipeline.nn.corruption import Corruption, corrupt
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.images import tile
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.start import start_as_moco
from pipeline.nn.upsampling import doublings

SHOWN = 8
"""Samples in the showcase."""
NARROWEST = 16
"""Channels of the decoder's last maps."""


class Config(EncoderConfig):
    """Settings of autoencoders; as they are, the plain one."""

    small_stem: bool = False
    """The stem for images of 32 pixels."""
    corruption: Corruption = Corruption()
    """Damage done to what the encoder sees, but not to what is to be made of it: the denoising autoencoder."""
    sparsity: Literal["none", "l1", "kl"] = "none"
    """Of the code: the mean of its absolute values; or, behind a sigmoid, the divergence of each unit's mean over the
    global batch from ``activity``, summed over units."""
    sparsity_weight: PositiveFloat = 1e-3
    activity: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """That each unit is to have on average, for "kl"."""
    contraction: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared Frobenius norm of the code's Jacobian with respect to the normalised image."""
    step: PositiveFloat = 0.1
    """Standard deviation of the noise by which the Jacobian is probed, in units of the normalised image."""
    decoder_dim: Annotated[int, Field(ge=1)] = 256
    """Channels of the decoder's first map; each doubling halves them, down to 16."""
    doublings: Annotated[int, Field(ge=0)] = 5
    """From the decoder's first map to the image."""

    @model_validator(mode="after")
    def _fit(self) -> Config:
        if self.contraction and self.corruption.active:
            raise ValueError("'contraction' probes the clean image; leave out 'corruption', or 'contraction'")
        return self


class Autoencoder(OneEncoder, PairwiseObjective):
    """Encoder with its own pooling, whose features are the code, and a convolutional decoder.

    Only the divergence compares samples: the mean activations are those of the global batch.
    """

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config, self.compares = config, config.sparsity == "kl"
        channels, (height, width) = len(config.mean), facts.image_size
        self.needs = {"image": f"uint8[B,{channels},H,W]"}
        side = 2**config.doublings
        if height % side or width % side:
            raise ConfigError(
                f"objective.doublings: {height}x{width} pixels are no whole map doubled {config.doublings} times; "
                "take fewer doublings, or another data.image.size"
            )
        self.encoder = construct_encoder(
            config, facts.image_size, "autoencoder", start=start_as_moco, stem_of_small_images=config.small_stem
        )
        widths = [max(NARROWEST, config.decoder_dim >> n) for n in range(config.doublings + 1)]
        first = (widths[0], height // side, width // side)
        self.decoder = nn.Sequential(
            nn.Linear(self.encoder.dim, first[0] * first[1] * first[2]),
            nn.Unflatten(1, first),
            nn.ReLU(),
            doublings(widths),
            nn.Conv2d(widths[-1], channels, 3, padding=1),
        )

    def embed(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """ "error", "penalty": float32[B], and "features", float[B,D]; "code", float32[B,D], where samples meet."""
        clean, seen = self.encoder.normalize(batch["image"]), self.seen(batch, ctx)
        features, moved = self._encode(seen, batch, ctx)
        code = self._code(features)
        error = (wide(self.decoder(code.to(features.dtype))) - clean).square().mean(dim=(1, 2, 3))
        penalty = torch.zeros_like(error)
        if self.config.sparsity == "l1":
            penalty = penalty + self.config.sparsity_weight * code.abs().mean(dim=1)
        if moved is not None:
            change = (self._code(moved) - code) / self.config.step
            penalty = penalty + self.config.contraction * change.square().sum(dim=1)
        rows = {"error": error, "penalty": penalty, "features": features.detach()}
        return rows | ({"code": code} if self.compares else {})

    def seen(self, batch: Batch, ctx: StepContext) -> Tensor:
        """What the encoder is given, float32[B,C,H,W], normalised."""
        x = self.encoder.normalize(batch["image"])
        if not self.config.corruption.active:
            return x
        return corrupt(x, ctx.random(batch, "autoencoder.corruption"), self.config.corruption)

    def _encode(self, x: Tensor, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor | None]:
        """Features of the batch; and of the batch moved by noise, under the same batch statistics and dropout."""
        if not self.config.contraction:
            with dropping_for(batch, ctx):
                return self.encoder.features(x), None
        noise = ctx.random(batch, "autoencoder.contraction").normal(*x.shape[1:])
        twice = {name: torch.cat([batch[name], batch[name]]) for name in ("id", "epoch")}
        with dropping_for(twice, ctx):
            features, moved = self.encoder.features(torch.cat([x, x + self.config.step * noise])).chunk(2)
        return features, moved

    def _code(self, features: Tensor) -> Tensor:
        """float32[B,D]; between 0 and 1 where the divergence is taken."""
        return wide(features).sigmoid() if self.config.sparsity == "kl" else wide(features)

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Squared error per number of the normalised image ("mse") and penalties ("penalty")."""
        rows, config = embeddings.rows, self.config
        losses, penalty = rows["error"] + rows["penalty"], rows["penalty"].detach().mean()
        if self.compares:
            divergence = config.sparsity_weight * bernoulli_divergence(config.activity, global_mean(rows["code"])).sum()
            losses, penalty = losses + divergence, penalty + divergence.detach()
        metrics = {"mse": rows["error"].detach().mean(), "penalty": penalty}
        return StepOutput(losses.mean(), metrics, losses.detach(), rows["features"])

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and what the encoder is given of it where that is damaged."""
        if not self.config.corruption.active:
            return {"image": batch["image"]}
        return {"image": batch["image"], "seen": self.encoder.normalize.invert(self.seen(batch, ctx))}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Rows: original, what is seen where that is another, and what is made of the code."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        with frozen_statistics(self), dropping_for(batch, ctx):
            features = self.encoder.features(self.seen(batch, ctx))
            made = self.decoder(self._code(features).to(features.dtype)).float()
        error = float((made - self.encoder.normalize(batch["image"])).square().mean())
        rows = [*self.inputs(batch, ctx).values(), self.encoder.normalize.invert(made)]
        caption = f"Original; {'what is seen; ' if len(rows) > 2 else ''}what is made of {self.encoder.dim} numbers"
        return {"reconstruction": Picture(tile(rows), f"{caption} (mean squared error {error:.3g})")}


def bernoulli_divergence(wanted: float, mean: Tensor) -> Tensor:
    """KL divergence of coins of the wanted probability from coins of the mean one, of each: of numbers from 0 to 1."""
    mean = mean.clamp(1e-6, 1 - 1e-6)
    return wanted * (wanted / mean).log() + (1 - wanted) * ((1 - wanted) / (1 - mean)).log()
