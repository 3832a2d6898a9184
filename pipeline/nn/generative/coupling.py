"""A flow of affine couplings on several scales: Glow, and with it the multi-scale architecture of RealNVP.

Kingma and Dhariwal, "Glow" (NeurIPS 2018, arXiv 1807.03039), figure 2 and section 3; Dinh et al., "Density estimation
using Real NVP" (ICLR 2017, 1605.08803), sections 3.2 and 3.6. Initial values, borders and the order within a step are
those of the authors' code (openai/glow).
Shape letters: B samples, C channels, H height, W width, O channels that come out, K kernel size.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.nn.encoder import to_weights
from pipeline.nn.generative.invertible import RATE, ActNorm, Coded, InvertibleConv, squeeze, unsqueeze, wide

STD = 0.05
"""Of the initial weights of hidden layers."""
OPEN = 2.0
"""Added to what the sigmoid makes a scale of, so that couplings begin near the identity."""


class CouplingConfig(Strict):
    """Settings; the defaults are Glow's for CIFAR-10."""

    name: Literal["coupling"] = "coupling"
    levels: Annotated[int, Field(ge=1)] = 3
    """Scales, each half as high and wide as the one before; half the channels leave at the end of all but the last."""
    steps: Annotated[int, Field(ge=1)] = 32
    """Of each level: actnorm, invertible 1x1 convolution, coupling."""
    width: Annotated[int, Field(ge=1)] = 512
    """Hidden channels of the networks within couplings."""


class EdgeConv(nn.Module):
    """A convolution without bias that sees where the image ends: one more channel is 1 outside and 0 inside.

    Args:
        channels: C; 0: it sees nothing else.
        out: O.
        kernel: K, odd.
        std: of the initial weights.
    """

    def __init__(self, channels: int, out: int, kernel: int, std: float) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.weight = nn.Parameter(std * torch.randn(out, kernel, kernel, channels)) if channels else None
        """[O,K,K,C]: as channels-last images need it."""
        self.edge = nn.Parameter(std * torch.randn(out, kernel, kernel, 1)) if kernel > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to [B,O,H,W]; where there are no channels, to [1,O,H,W]."""
        y = x.new_zeros(1)
        if self.weight is not None:
            y = functional.conv2d(x, self.weight.permute(0, 3, 1, 2), padding=self.reach)
        if self.edge is None:
            return y
        # Where the image ends does not depend on the image: one map for the whole batch.
        outside = functional.pad(x.new_zeros(1, 1, *x.shape[2:]), (self.reach,) * 4, value=1.0)
        return y + functional.conv2d(outside, self.edge.permute(0, 3, 1, 2))


class ZeroConv(nn.Module):
    """A convolution of 3 by 3 that begins at zero, with a bias and a learned scale of what comes out."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = EdgeConv(channels, out, 3, 0.0)
        self.bias, self.log_scale = (nn.Parameter(torch.zeros(out)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[B,C,H,W] to at least float32[B,O,H,W]."""
        y = wide(self.conv(to_weights(x, self)))
        return (y + wide(self.bias).view(-1, 1, 1)) * torch.exp(RATE * wide(self.log_scale)).view(-1, 1, 1)


class Affine(NamedTuple):
    """What a coupling does to the half that it changes."""

    shift: Tensor
    """[B,C,H,W]."""
    log_scale: Tensor
    """[B,C,H,W], below zero."""
    hidden: Tensor
    """[B,width,H,W]."""


class Coupling(nn.Module):
    """Shifts and scales the second half of the channels by what a network makes of the first.

    Args:
        channels: C, even.
        width: hidden channels.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv1, self.norm1 = EdgeConv(half, width, 3, STD), ActNorm(width)
        self.conv2, self.norm2 = EdgeConv(width, width, 1, STD), ActNorm(width)
        self.out = ZeroConv(width, 2 * (channels - half))

    def affine(self, kept: Tensor) -> Affine:
        """Of the half that stays as it is, [B,C/2,H,W]."""
        h = functional.relu(self.norm1(self.conv1(to_weights(kept, self)))[0])
        hidden = functional.relu(self.norm2(self.conv2(to_weights(h, self)))[0])
        shift, scale = self.out(hidden).chunk(2, dim=1)
        return Affine(shift, functional.logsigmoid(scale + OPEN), hidden)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x2 + shift) * scale beside x1, the log-determinant, [B], and the hidden layer, [B,width,H,W]."""
        kept, changed = x.chunk(2, dim=1)
        own = self.affine(kept)
        y = torch.cat([kept, (changed + own.shift) * own.log_scale.exp()], dim=1)
        return y, own.log_scale.flatten(1).sum(dim=1), own.hidden

    def inverse(self, y: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        kept, changed = y.chunk(2, dim=1)
        own = self.affine(kept)
        return torch.cat([kept, changed * (-own.log_scale).exp() - own.shift], dim=1)


class Step(nn.Module):
    """Actnorm, 1x1 convolution, coupling."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm, self.mix, self.couple = ActNorm(channels), InvertibleConv(channels), Coupling(channels, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Coupling.forward`."""
        x, of_norm = self.norm(x)
        x, of_mix = self.mix(x)
        x, of_couple, hidden = self.couple(x)
        return x, of_couple + of_norm + of_mix, hidden

    def inverse(self, y: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        return self.norm.inverse(self.mix.inverse(self.couple.inverse(y)))


class Leaving(nn.Module):
    """What leaves the flow as noise: normal, with mean and spread that a convolution reads off what stays.

    Args:
        seen: channels of what stays; 0: nothing does, and mean and spread depend on the image's ends alone.
        channels: C of what leaves.
    """

    def __init__(self, seen: int, channels: int) -> None:
        super().__init__()
        self.prior = ZeroConv(seen, 2 * channels)

    def forward(self, leaves: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """[B,C,H,W] and what it sees, [B,seen,H,W], to noise [B,C,H,W] and the log-determinant, [B]."""
        mean, log_std = self.prior(seen).chunk(2, dim=1)
        log_det = -log_std.expand_as(leaves).flatten(1).sum(dim=1)
        return (leaves - mean) * (-log_std).exp(), log_det

    def inverse(self, noise: Tensor, seen: Tensor) -> Tensor:
        """[B,C,H,W] to the same."""
        mean, log_std = self.prior(seen).chunk(2, dim=1)
        return noise * log_std.exp() + mean


class Level(nn.Module):
    """Steps at one scale, at whose end a part of the channels leaves.

    Args:
        config: settings.
        channels: C after squares of pixels have become channels.
        stays: of these.
    """

    def __init__(self, config: CouplingConfig, channels: int, stays: int) -> None:
        super().__init__()
        self.stays = stays
        self.steps = nn.ModuleList([Step(channels, config.width) for _ in range(config.steps)])
        self.leaving = Leaving(stays, channels - stays)

    def forward(self, x: Tensor) -> tuple[Tensor, Coded]:
        """[B,C/4,2H,2W] to what stays, [B,stays,H,W], and what leaves; features are of the last coupling's network."""
        x = hidden = squeeze(x)
        log_det = x.new_zeros(len(x))
        for step in self.steps:
            x, of_step, hidden = step(x)
            log_det = log_det + of_step
        stays, leaves = x[:, : self.stays], x[:, self.stays :]
        noise, of_leaving = self.leaving(leaves, stays)
        return stays, Coded(noise.flatten(1), log_det + of_leaving, hidden.mean(dim=(2, 3)))

    def inverse(self, stays: Tensor, noise: Tensor) -> Tensor:
        """[B,stays,H,W] and [B,C-stays,H,W] to [B,C/4,2H,2W]."""
        x = torch.cat([stays, self.leaving.inverse(noise, stays)], dim=1)
        steps: Any = self.steps
        for step in reversed(steps):
            x = step.inverse(x)
        return unsqueeze(x)


class CouplingFlow(nn.Module):
    """The network.

    Args:
        config: settings.
        shape: C, H, W of the images.

    Raises:
        ConfigError: the images cannot be halved so often.
    """

    def __init__(self, config: CouplingConfig, shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, height, width = shape
        factor = 2**config.levels
        if height % factor or width % factor:
            raise ConfigError(
                f"network.levels = {config.levels}: each level halves the image, whose sides must be multiples of "
                f"{factor} pixels; they are {height}x{width}. Set fewer levels, or another data.image.size"
            )
        self.levels = nn.ModuleList()
        self.shapes: list[tuple[int, int, int]] = []
        """Of the noise that leaves after each level."""
        for level in range(config.levels):
            channels, height, width = 4 * channels, height // 2, width // 2
            stays = channels // 2 if level < config.levels - 1 else 0
            self.levels.append(Level(config, channels, stays))
            self.shapes.append((channels - stays, height, width))
            channels = stays
        self.dim = config.levels * config.width
        """F."""

    def forward(self, x: Tensor) -> Coded:
        """Dequantised images [B,C,H,W]; features are those of all levels."""
        x, parts = wide(x).contiguous(memory_format=torch.channels_last), list[Coded]()
        for level in self.levels:
            x, part = level(x)
            parts.append(part)
        noise, log_det, features = zip(*parts, strict=True)
        return Coded(torch.cat(noise, dim=1), torch.stack(log_det).sum(dim=0), torch.cat(features, dim=1))

    def inverse(self, noise: Tensor) -> Tensor:
        """[B,D] to images [B,C,H,W]."""
        parts = noise.split([channels * height * width for channels, height, width in self.shapes], dim=1)
        levels: Any = self.levels
        x = noise[:, :0].view(len(noise), 0, *self.shapes[-1][1:])
        for level, part, shape in reversed([*zip(levels, parts, self.shapes, strict=True)]):
            x = level.inverse(x, part.unflatten(1, shape))
        return x
