"""Images with something taken away, and a network that puts it back.

Small images: the residual blocks and shuffled pixels of SRResNet (Ledig et al. 2017, arXiv 1609.04802) without its
batch norm (Lim et al. 2017, 1707.02921), and with what is to be added to plain upscaling as its answer (Kim et al.
2016, 1511.04587). Hidden parts: Pathak et al. 2016 (1604.07379), by a network that halves the size before its blocks
(Nazeri et al. 2019, 1901.00212).
Shape letters: B samples, C channels, H height, W width, h and w of what the network is given.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.strict import Positive, Strict
from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.convolution import Conv
from pipeline.nn.diffusion.space import to_model, to_pixels
from pipeline.nn.encoder import to_weights
from pipeline.nn.images import unpatchify
from pipeline.nn.masking import draw_masks
from pipeline.nn.zero import zeroed


class DownscaleConfig(Strict):
    """Super-resolution: images are shrunk, bicubically with antialiasing, and rounded as files are."""

    name: Literal["downscale"] = "downscale"
    factor: Literal[2, 4, 8] = 4


class MaskConfig(Strict):
    """Inpainting: patches are hidden."""

    name: Literal["mask"] = "mask"
    patch: Positive = 8
    """Pixels a side."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Part of the patches that is hidden."""
    pattern: Literal["random", "block"] = "block"


TaskConfig = DownscaleConfig | MaskConfig


class Degraded(NamedTuple):
    """What is left of images."""

    given: Tensor
    """What the network is given, float32[B,c,h,w], from -1 to 1."""
    base: Tensor
    """The answer without a network, float32[B,C,H,W]: plain upscaling, or grey where nothing is seen."""
    hidden: Tensor
    """bool[B,1,H,W] or bool[1,1,1,1], what is to be restored."""


def check_task(task: TaskConfig, image_size: tuple[int, int]) -> None:
    """Hold a task against the images.

    Raises:
        ConfigError: it does not fit them.
    """
    unit = task.factor if isinstance(task, DownscaleConfig) else task.patch
    if any(size % unit for size in image_size):
        setting = "task.factor" if isinstance(task, DownscaleConfig) else "task.patch"
        raise ConfigError(
            f"{setting} = {unit} does not divide images of {image_size[0]}x{image_size[1]}; change one of them"
        )
    if isinstance(task, MaskConfig) and not 0 < _hidden(task, image_size) < _patches(task, image_size):
        raise ConfigError(
            f"task.ratio = {task.ratio:g} of {_patches(task, image_size)} patches hides none, or all; change task.patch"
        )


def _patches(task: MaskConfig, image_size: tuple[int, int]) -> int:
    return math.prod(size // task.patch for size in image_size)


def _hidden(task: MaskConfig, image_size: tuple[int, int]) -> int:
    return round(task.ratio * _patches(task, image_size))


def degrade(task: TaskConfig, image: Tensor, random: SampleRandom) -> Degraded:
    """Take something away from uint8[B,C,H,W]; ``random`` belongs to the samples."""
    clean = to_model(image)
    if isinstance(task, DownscaleConfig):
        small = functional.interpolate(clean, scale_factor=1 / task.factor, mode="bicubic", antialias=True)
        small = to_model(to_pixels(small))
        base = functional.interpolate(small, scale_factor=float(task.factor), mode="bicubic")
        return Degraded(small, base, torch.ones(1, 1, 1, 1, dtype=torch.bool, device=image.device))
    size = (image.shape[2], image.shape[3])
    grid = (size[0] // task.patch, size[1] // task.patch)
    count = _hidden(task, size)
    _, hidden = draw_masks(task.pattern, random, grid, grid[0] * grid[1] - count)
    rows = torch.zeros(len(image), grid[0] * grid[1], device=image.device).scatter(1, hidden, 1.0)
    cells = rows[:, :, None].expand(-1, -1, task.patch**2)
    mask = unpatchify(cells, (task.patch, task.patch), grid) > 0
    base = clean.where(~mask, 0.0)
    return Degraded(torch.cat([base, mask.to(base.dtype)], dim=1), base, mask)


class RestorerConfig(Strict):
    """Settings; the defaults are SRResNet's, and for hidden parts those of its kind."""

    channels: Positive = 64
    blocks: Positive = 16
    halvings: Annotated[int, Field(ge=0)] = 2
    """Before the blocks, where parts are hidden; small images are not made smaller."""


class _Block(nn.Module):
    """Convolution, ReLU, convolution; around them a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = Conv(channels, channels, 3), Conv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        return x + self.conv2(functional.relu(self.conv1(x)))


class _Up(nn.Module):
    """A convolution whose channels become places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv(channels, 4 * channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,C,2H,2W]."""
        return functional.relu(functional.pixel_shuffle(self.conv(x), 2))


class Restorer(nn.Module):
    """The network: it says what is to be added to the answer without it, at first nothing.

    Args:
        config: settings.
        task: what is taken away.
        image_size: height and width.
        channels: C of the images.

    Raises:
        ConfigError: images that cannot be halved so often.
    """

    def __init__(self, config: RestorerConfig, task: TaskConfig, image_size: tuple[int, int], channels: int) -> None:
        super().__init__()
        width = config.channels
        shrunk = isinstance(task, DownscaleConfig)
        halvings = 0 if shrunk else config.halvings
        if any(size % 2**halvings for size in image_size):
            raise ConfigError(
                f"restorer.halvings = {halvings}: images of {image_size[0]}x{image_size[1]} cannot be halved so often"
            )
        doublings = int(math.log2(task.factor)) if isinstance(task, DownscaleConfig) else halvings
        self.conv_in = Conv(channels if shrunk else channels + 1, width, 3)
        self.down = nn.ModuleList([Conv(width, width, 3, stride=2) for _ in range(halvings)])
        self.blocks = nn.ModuleList([_Block(width) for _ in range(config.blocks)])
        self.conv_body = Conv(width, width, 3)
        self.up = nn.ModuleList([_Up(width) for _ in range(doublings)])
        self.conv_out = zeroed(Conv(width, channels, 3))

    def forward(self, own: Degraded) -> Tensor:
        """Restored images, at least float32[B,C,H,W]; what is seen stays as it is."""
        x = functional.relu(self.conv_in(to_weights(own.given, self).contiguous(memory_format=torch.channels_last)))
        for conv in self.down:
            x = functional.relu(conv(x))
        h = x
        for block in self.blocks:
            h = block(h)
        x = x + self.conv_body(h)
        for layer in self.up:
            x = layer(x)
        x = self.conv_out(x)
        added = x.to(torch.promote_types(x.dtype, torch.float32))
        return torch.where(own.hidden, own.base + added, own.base)
