"""What is diffused: pixels, or the latents of a frozen autoencoder.

Latent diffusion: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022, arXiv
2112.10752), section 3; latents are scaled to a standard deviation of one (appendix G).
Shape letters: B samples, C channels, H height, W width, Z channels of latents, h and w their height and width.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.core.errors import ConfigError, DataError
from pipeline.core.protocols import Batch, StepContext
from pipeline.core.random import SampleRandom
from pipeline.dist.collectives import all_reduce
from pipeline.nn.generative.frozen import FrozenAutoencoder, FrozenConfig


class LatentConfig(FrozenConfig):
    """The autoencoder whose latents are diffused."""

    scale: Annotated[float, Field(gt=0)] | None = None
    """Latents are multiplied by it (0.18215 for Stable Diffusion's autoencoders); left out: by one over their standard
    deviation over the training data, which is measured once, before the first update."""


def to_model(image: Tensor) -> Tensor:
    """uint8[B,C,H,W] to float32 from -1 to 1."""
    return image.float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """From -1 to 1 to uint8, rounded to the nearest."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Pixels(nn.Module):
    """Pixels themselves, from -1 to 1.

    Args:
        shape: C, H, W.
    """

    bounded = True
    """Values lie from -1 to 1."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def clean(self, image: Tensor, random: SampleRandom | None) -> Tensor:
        """uint8[B,C,H,W] to what is noised: float32[B,C,H,W]."""
        return to_model(image)

    def image(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """What is denoised to uint8[B,C,H,W]."""
        return to_pixels(x)


class Latents(nn.Module):
    """Latents of a frozen autoencoder, times a number.

    Args:
        config: of the autoencoder.
        image_shape: C, H, W of images.
    """

    bounded = False
    scale: Tensor
    """float32[1]."""

    def __init__(self, config: LatentConfig, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.measured = config.scale is None
        """Whether the scale is to be measured."""
        self.autoencoder = FrozenAutoencoder(config, image_shape)
        self.shape = self.autoencoder.shape
        self.register_buffer("scale", torch.tensor([config.scale or 1.0]))

    def clean(self, image: Tensor, random: SampleRandom | None) -> Tensor:
        """uint8[B,C,H,W] to float32[B,Z,h,w]; drawn of a posterior, or with no ``random`` its mean."""
        return self.autoencoder.latents(image, random).float() * self.scale.float()

    def image(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        """[B,Z,h,w] to uint8[B,C,H,W].

        Args:
            x: latents.
            ids: int64[B], of what is made; to be named where the decoder gives something that is not finite.

        Raises:
            NonFiniteError: it does.
        """
        return self.autoencoder.image((x / self.scale.to(x.dtype)).float(), ids)

    def look(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """What the scale is made of: mean and mean square of each sample's latents, float64[B] each."""
        z = self.autoencoder.latents(batch["image"], ctx.random(batch, "ddpm.latent")).double().flatten(1)
        return {"mean": z.mean(dim=1), "square": z.square().mean(dim=1)}

    def surveyed(self, rows: dict[str, Tensor]) -> None:
        """Set the scale by the samples of all ranks.

        Raises:
            DataError: all latents are the same, or not finite.
        """
        total = torch.stack([rows["mean"].sum(), rows["square"].sum(), torch.ones_like(rows["mean"]).sum()])
        mean, square, count = all_reduce(total).unbind()
        variance = float(square / count - (mean / count).square())
        if not 0 < variance < float("inf"):
            raise DataError(
                f"latents of the training data have the variance {variance}: there is no scale that makes it one; look "
                "at the autoencoder (sluice train shows what it decodes), or set latent.scale"
            )
        self.scale.fill_(variance**-0.5)


Space = Pixels | Latents


def refuse_likelihood(space: Space) -> None:
    """Of latents there is none.

    Raises:
        ConfigError: it is asked for.
    """
    if not space.bounded:
        raise ConfigError(
            "this model diffuses latents: what it bounds is the density of latents, of images there is no likelihood; "
            "measure its samples (frechet, prdc), or the autoencoder's likelihood"
        )
