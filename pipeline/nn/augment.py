"""Colour augmentation on the device, for whole batches, with random numbers that belong to the samples.

The distortions of SimCLR (Chen et al. 2020, appendix A) as torchvision defines them: jitter of brightness, contrast,
saturation and hue in random order, grey, Gaussian blur, and BYOL's solarisation. Crop and flip are done before, when
images are decoded. Shape letters: B samples, H height, W width, n samples that an operation is applied to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.protocols import Batch, StepContext

Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0, le=1)]


CACHED = 2**16
"""Numbers of images whose colours are changed at once on a CPU: a quarter of a megabyte in each of a few copies."""


class Colour(Strict):
    """How strongly, and how often; the defaults are SimCLR's for ImageNet."""

    brightness: Strength = 0.8
    """Factor drawn from 1 - b to 1 + b; the same for the next two."""
    contrast: Strength = 0.8
    saturation: Strength = 0.8
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.2
    """Turn of the colour circle, drawn from -h to h."""
    jitter: Probability = 0.8
    """Part of the samples whose colours are jittered; the same for the next three."""
    grey: Probability = 0.2
    blur: Probability = 0.5
    solarize: Probability = 0.0
    sigma: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.1, 2.0)
    """Of the blur, in pixels."""


def augment(image: Tensor, batch: Batch, ctx: StepContext, colour: Colour, view: str) -> Tensor:
    """Distort the colours of a batch.

    Args:
        image: uint8[B,3,H,W].
        batch: whose samples these are.
        ctx: of the step.
        colour: what is done.
        view: name of the view, so that two views of a sample differ.

    Returns:
        float32[B,3,H,W] from 0 to 1.
    """
    x = image.float().div_(255)
    coins = ctx.random(batch, f"{view}.coins").uniform(4)
    strengths = ctx.random(batch, f"{view}.strengths").uniform(5)
    order = ctx.random(batch, f"{view}.order").permutation(4)
    jittered = coins[:, 0] < colour.jitter
    operations = (
        (_brightness, 1 + colour.brightness * (2 * strengths[:, 0] - 1)),
        (_contrast, 1 + colour.contrast * (2 * strengths[:, 1] - 1)),
        (_saturation, 1 + colour.saturation * (2 * strengths[:, 2] - 1)),
        (_hue, colour.hue * (2 * strengths[:, 3] - 1)),
    )
    for turn in range(4):
        for number, (operation, amount) in enumerate(operations):
            _apply(operation, x, amount, (jittered & (order[:, turn] == number)).nonzero().squeeze(1))
    chosen = (coins[:, 1] < colour.grey).nonzero().squeeze(1)
    x[chosen] = grey(x[chosen])
    sigma = colour.sigma[0] + (colour.sigma[1] - colour.sigma[0]) * strengths[:, 4]
    chosen = (coins[:, 2] < colour.blur).nonzero().squeeze(1)
    x[chosen] = blur(x[chosen], sigma[chosen])
    if colour.solarize == 0:
        return x
    return torch.where(_column(coins[:, 3] < colour.solarize) & (x >= 0.5), 1 - x, x)


def _apply(operation: Callable[[Tensor, Tensor], Tensor], x: Tensor, amount: Tensor, chosen: Tensor) -> None:
    """Apply to the chosen samples, in place."""
    if x.device.type == "cpu":
        # A few at a time, so that all passes over them find them in the processor's cache.
        for some in chosen.split(max(1, CACHED // x[:1].numel())):
            x[some] = operation(x[some], _column(amount[some])).clamp_(0, 1)
    elif len(chosen):
        x[chosen] = operation(x[chosen], _column(amount[chosen])).clamp_(0, 1)


def _column(values: Tensor) -> Tensor:
    """[n] to [n,1,1,1]."""
    return values.view(-1, 1, 1, 1)


def grey(x: Tensor) -> Tensor:
    """Brightness of each pixel by Rec. 601, [n,3,H,W] to [n,1,H,W]."""
    red, green, blue = x.split(1, dim=1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x * factor


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grey(x.mean(dim=(2, 3), keepdim=True)), x, factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(grey(x), x, factor)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of HSV by a part of the circle; saturation and value stay."""
    red, green, blue = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(red, green), blue)
    # Without chroma the hue is of no consequence, so it may be as good as nothing instead of nothing.
    chroma = (value - torch.minimum(torch.minimum(red, green), blue)).clamp_min_(torch.finfo(x.dtype).tiny)
    hue, other = (red - green).add_(chroma, alpha=4), (blue - red).add_(chroma, alpha=2)
    # A choice between two by a weight of 0 or 1, which on a CPU takes a tenth of torch.where's time.
    hue.lerp_(other, _equal(green, value)).lerp_(torch.sub(green, blue, out=other), _equal(red, value))
    hue.div_(chroma).add_(6 * turn)
    # Back by the closed form: channel c is value - chroma * max(0, min(k, 4 - k, 1)), k = (n_c + hue) mod 6.
    result = torch.empty_like(x)
    for k, start in zip(result.split(1, dim=1), (5.0, 3.0, 1.0), strict=True):
        torch.add(hue, start, out=k)
        k.sub_(torch.div(k, 6, out=other).floor_(), alpha=6)
        k.sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
        torch.addcmul(value, k, chroma, value=-1, out=k)
    return result


def _equal(x: Tensor, largest: Tensor) -> Tensor:
    """1.0 where x is as large as ``largest``, else 0.0."""
    return (x - largest).mul_(1e30).add_(1).clamp_min_(0)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a sigma per sample, reflected at the edges; the kernel is a tenth of the side.

    Args:
        x: [n,3,H,W].
        sigma: [n], in pixels.
    """
    n, c, h, w = x.shape
    radius = max(1, min(h, w) // 20)
    if n == 0 or radius >= min(h, w):
        return x
    offset = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (offset / sigma[:, None]).square()).exp()
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(c, dim=0)
    padded = functional.pad(x, (radius,) * 4, mode="reflect").view(1, n * c, h + 2 * radius, w + 2 * radius)
    with torch.autocast(x.device.type, enabled=False):
        rows = functional.conv2d(padded, kernel.view(n * c, 1, -1, 1), groups=n * c)
        return functional.conv2d(rows, kernel.view(n * c, 1, 1, -1), groups=n * c).view(n, c, h, w)
