"""DRCN: one encoder classifies the source and reconstructs the target.

Ghifary et al., "Deep Reconstruction-Classification Networks for Unsupervised Domain Adaptation" (ECCV 2016, arXiv
1607.03516): lambda times the cross-entropy on the source plus 1 - lambda times the squared error of the target's
images, which the encoder is given damaged. The paper takes turns between both by epochs; here each step has both,
which is the sum that it writes down. Shape letters: B samples, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.strict import Positive
from pipeline.core.batch import batch_of
from pipeline.core.protocols import Batch, DataFacts, Picture, StepContext
from pipeline.nn.adaptation.adaptation import Adaptation, AdaptationConfig, Domains
from pipeline.nn.adaptation.decoder import FeatureDecoder
from pipeline.nn.batch_norm import frozen_statistics
from pipeline.nn.classifier import SHOWN
from pipeline.nn.corruption import Corruption, corrupt
from pipeline.nn.dropout import dropping_for
from pipeline.nn.images import tile


class Config(AdaptationConfig):
    """Settings of DRCN."""

    balance: Annotated[float, Field(ge=0, le=1)] = 0.7
    """The paper's lambda: weight of the cross-entropy; the reconstruction has the rest."""
    corruption: Corruption = Corruption(pixels=0.5)
    """Of the target's images, before they are encoded."""
    decoder_width: Positive = 32
    """Channels of the decoder's last map."""


class AdaptDRCN(Adaptation):
    """Cross-entropy on the source, squared error of the target's pixels, from 0 to 1."""

    compares = False

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "adapt_drcn")
        self.config = config
        self.decoder = FeatureDecoder(self.width, len(config.mean), facts.image_size, config.decoder_width)

    def target_image(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Damaged, float32[B,C,H,W]."""
        x = self.encoder.normalize(batch["image"])
        return corrupt(x, ctx.random(batch, "drcn.corruption"), self.config.corruption) if ctx.training else x

    def compared(self, domains: Domains, ctx: StepContext) -> dict[str, Tensor]:
        """Mean squared error of each of the target's images, float32[B]."""
        image = self.decoder(domains.target.features).float()
        errors = (image - domains.target_batch["image"].float() / 255).square().mean(dim=(1, 2, 3))
        return {"reconstruction": errors}

    def beside(self, rows: Mapping[str, Tensor], ctx: StepContext) -> tuple[Tensor, dict[str, Tensor]]:
        """Both parts."""
        balance = self.config.balance
        losses = balance * rows["classification"] + (1 - balance) * rows["reconstruction"]
        return losses, {"reconstruction": rows["reconstruction"].detach().mean()}

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """Source, target, and the target as the encoder is given it."""
        target = batch_of(batch, self.target_at(ctx.clock.progress))
        damaged = self.encoder.normalize.invert(self.target_image(target, ctx))
        return {"image": batch["image"], "target": target["image"], "damaged": damaged}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Beside what others show: targets, damaged, and what is made of them."""
        few = {name: value[:SHOWN] for name, value in batch_of(batch, self.target_at(ctx.clock.progress)).items()}
        damaged = self.target_image(few, ctx)
        with frozen_statistics(self), dropping_for(few, ctx):
            made = self.decoder(self.answer(damaged).features).float()
        pixels = (made.clamp(0, 1) * 255).round().to(torch.uint8)
        rows = [few["image"], self.encoder.normalize.invert(damaged), pixels]
        picture = Picture(tile(rows), "Targets, damaged, and reconstructed")
        return super().showcase(batch, ctx) | {"reconstruction": picture}
