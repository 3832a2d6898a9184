"""Mixup, CutMix and random erasing on the device, for training classifiers.

Zhang et al., "mixup" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019); Zhong et al., "Random Erasing" (AAAI 2020). Each
sample is mixed with its neighbour in the batch, (0, 1), (2, 3), ..., by a part of its own: so the result does not
depend on how the batch is cut into micro-batches or shared out over ranks, as long as they are even.
Shape letters: B samples, C channels, H height, W width.
"""

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.corruption import rectangle

TRIES = 24
"""Pairs drawn for one number of a beta distribution; that all are rejected has a probability of 6e-8 at most."""
ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = 1 / 0.3


class Mixing(Strict):
    """How samples are mixed; zero turns a kind off."""

    mixup: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Parameter of the symmetric beta distribution that the parts of blended images come from."""
    cutmix: Annotated[float, Field(ge=0, le=2)] = 0.0
    """The same for the area of a rectangle taken from the other image; with mixup, each for half the samples."""
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a rectangle of 2 to 33 % of the image is replaced by noise."""

    @property
    def active(self) -> bool:
        """Whether anything is done at all."""
        return max(self.mixup, self.cutmix, self.erase) > 0


class Mixed(NamedTuple):
    """What became of a batch."""

    x: Tensor
    """float32[B,C,H,W]."""
    partner: Tensor
    """int64[B], the row that each sample was mixed with."""
    part: Tensor
    """float32[B], how much of each sample is still its own."""


def mix(x: Tensor, random: SampleRandom, settings: Mixing) -> Mixed:
    """Erase, then mix, normalised images, float32[B,C,H,W]: the order of timm and of MAE's fine-tuning.

    Raises:
        ConfigError: samples cannot be mixed in pairs, since B is odd.
    """
    b, size = len(x), (x.shape[2], x.shape[3])
    partner, part = torch.arange(b, device=x.device), x.new_ones(b)
    if settings.erase:
        hole = rectangle(random, size, ERASED_AREA, ERASED_ASPECT)
        hole = hole & (random.uniform() < settings.erase)[:, None, None, None]
        x = torch.where(hole, random.normal(*x.shape[1:]), x)
    if settings.mixup or settings.cutmix:
        if b % 2:
            raise ConfigError(f"engine.micro_batch: samples are mixed in pairs, and {b} is odd; take an even number")
        partner = partner ^ 1
        which = random.uniform()
        cut = which < (0.5 if settings.mixup and settings.cutmix else float(settings.cutmix > 0))
        blend = beta(random, settings.mixup) if settings.mixup else x.new_ones(b)
        keep = beta(random, settings.cutmix) if settings.cutmix else x.new_ones(b)
        hole = _cut(random, keep, size)
        part = torch.where(cut, 1 - hole.float().mean((1, 2, 3)), blend)
        weight = torch.where(cut[:, None, None, None], 1 - hole.float(), blend[:, None, None, None])
        x = weight * x + (1 - weight) * x[partner]
    return Mixed(x, partner, part)


def beta(random: SampleRandom, alpha: float) -> Tensor:
    """One number per sample of the symmetric beta distribution, float32[B]; exact, by rejection.

    Below 1 pairs of powers (Johnk 1964), of which at least half are accepted; from 1 on, where those become rare (one
    in six at 2), points beneath the density's peak, of which two thirds are at 2.
    """
    u, v = random.uniform(2, TRIES).double().unbind(1)
    if alpha < 1:
        u, v = u.pow(1 / alpha), v.pow(1 / alpha)
        accepted = (u + v <= 1) & (u + v > 0)
        x = u / (u + v)
    else:
        accepted = v <= (4 * u * (1 - u)).pow(alpha - 1)
        x = u
    first = accepted.to(torch.int8).argmax(dim=1, keepdim=True)
    return torch.where(accepted.any(dim=1), x.gather(1, first)[:, 0], 0.5).float()


def _cut(random: SampleRandom, keep: Tensor, size: tuple[int, int]) -> Tensor:
    """CutMix's rectangle of area 1 - keep around a random point, cut off at the border: bool[B,1,H,W]."""
    rows, columns = size
    side = (1 - keep).sqrt()[:, None, None, None]
    y, x = random.uniform(2)[:, :, None, None, None].unbind(1)
    row = torch.arange(rows, device=keep.device)[:, None] + 0.5
    column = torch.arange(columns, device=keep.device) + 0.5
    return ((row - y * rows).abs() < side * rows / 2) & ((column - x * columns).abs() < side * columns / 2)
