"""Damaging images on purpose: noise, dropped pixels, dropped channels, rectangular holes.

For denoising autoencoders (Vincent et al., "Extracting and Composing Robust Features with Denoising Autoencoders",
ICML 2008) and inpainting (Pathak et al., "Context Encoders", CVPR 2016). Each sample is damaged by numbers of its own.
Shape letters: B samples, C channels, H height, W width.
"""

import math
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.random import SampleRandom

Part = Annotated[float, Field(ge=0, le=1)]
HOLE_ASPECT = 2.0


class Corruption(Strict):
    """What is done to an image before the encoder sees it; what is dropped becomes the mean colour."""

    noise: Annotated[float, Field(ge=0)] = 0.0
    """Standard deviation of Gaussian noise, in units of the normalised image."""
    pixels: Part = 0.0
    """Probability that a pixel is dropped."""
    channels: Part = 0.0
    """Probability that a channel is dropped; one channel, drawn at random, always stays."""
    holes: Annotated[int, Field(ge=0)] = 0
    """Rectangles that are dropped."""
    hole_area: tuple[Part, Part] = (0.05, 0.25)
    """Least and most area of a hole, as a part of the image; its aspect is from 1/2 to 2, log-uniform."""

    @model_validator(mode="after")
    def _range(self) -> "Corruption":
        if self.hole_area[0] > self.hole_area[1]:
            raise ValueError(f"hole_area runs from {self.hole_area[0]} down to {self.hole_area[1]}; turn it round")
        return self

    @property
    def active(self) -> bool:
        """Whether anything is damaged at all."""
        return max(self.noise, self.pixels, self.channels, self.holes) > 0


def corrupt(x: Tensor, random: SampleRandom, settings: Corruption) -> Tensor:
    """Damage normalised images, float32[B,C,H,W]; zero is the mean colour."""
    c, h, w = x.shape[1:]
    if settings.noise:
        x = x + settings.noise * random.normal(c, h, w)
    if settings.pixels:
        x = x * (random.uniform(1, h, w) >= settings.pixels)
    if settings.channels:
        stays = random.integers(0, c, 1) == torch.arange(c, device=x.device)
        x = x * (stays | (random.uniform(c) >= settings.channels))[:, :, None, None]
    for _ in range(settings.holes):
        x = x * ~rectangle(random, (h, w), settings.hole_area, HOLE_ASPECT)
    return x


def rectangle(random: SampleRandom, size: tuple[int, int], area: tuple[float, float], aspect: float) -> Tensor:
    """One random rectangle inside each image.

    Args:
        random: numbers of the samples.
        size: height and width.
        area: least and most, as a part of the image.
        aspect: largest of height over width and width over height; it is log-uniform.

    Returns:
        bool[B,1,H,W].
    """
    rows, columns = size
    part_u, aspect_u, top_u, left_u = random.uniform(4)[:, :, None, None, None].unbind(1)
    pixels = (area[0] + part_u * (area[1] - area[0])) * rows * columns
    ratio = torch.exp((2 * aspect_u - 1) * math.log(aspect))
    height, width = (pixels * ratio).sqrt().clamp(1, rows), (pixels / ratio).sqrt().clamp(1, columns)
    top, left = top_u * (rows - height), left_u * (columns - width)
    row = torch.arange(rows, device=top.device)[:, None] + 0.5
    column = torch.arange(columns, device=top.device) + 0.5
    return (row > top) & (row < top + height) & (column > left) & (column < left + width)
