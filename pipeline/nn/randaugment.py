"""RandAugment on the device, on whole batches, with numbers that belong to the sample.

Cubuk et al., "RandAugment" (CVPR Workshops 2020), in the form of timm that vision transformers are fine-tuned with
("rand-m9-mstd0.5-inc1"): layers of one operation each, drawn from fifteen, applied with probability 1/2, at a
magnitude around 9 of 10. Every operation but colour, sharpness and the geometric ones maps the values of a channel
one by one, so that one table of 256 entries per sample and channel does them all.
Shape letters: B samples, H height, W width. Images are float32[B,3,H,W] that hold whole numbers from 0 to 255.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.random import SampleRandom

OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd",
    "ContrastIncreasing", "BrightnessIncreasing", "ColorIncreasing", "SharpnessIncreasing",
    "Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel",
)  # fmt: skip
"""timm's names."""
NOTHING = -1


class RandAugment(Strict):
    """How much is done."""

    layers: Annotated[int, Field(ge=1)] = 2
    """Operations drawn for each sample, one after the other."""
    magnitude: Annotated[float, Field(ge=0, le=10)] = 9.0
    spread: Annotated[float, Field(ge=0)] = 0.5
    """Standard deviation of the magnitude, which stays between 0 and 10."""
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5
    """With which an operation that was drawn is applied."""


def rand_augment(image: Tensor, random: SampleRandom, settings: RandAugment, fill: Tensor) -> Tensor:
    """Augment a batch.

    Args:
        image: uint8[B,3,H,W].
        random: numbers of the samples.
        settings: how much.
        fill: float[3] from 0 to 255, the colour of what comes in from outside.

    Returns:
        uint8[B,3,H,W].
    """
    x = image.float()
    for _ in range(settings.layers):
        operation = random.integers(0, len(OPERATIONS), 1)[:, 0]
        applied, side = random.uniform(2).unbind(1)
        level = (settings.magnitude + settings.spread * random.normal(1)[:, 0]).clamp(0, 10) / 10
        sign = torch.where(side < 0.5, -1.0, 1.0)
        x = apply(x, torch.where(applied < settings.probability, operation, NOTHING), level, sign, fill)
    return x.to(torch.uint8)


def apply(x: Tensor, operation: Tensor, level: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    """One operation for each sample.

    Args:
        x: images.
        operation: int64[B], a number in ``OPERATIONS``, or ``NOTHING``.
        level: float32[B], magnitude from 0 to 1.
        sign: float32[B], -1 or 1, where the operation has two directions.
        fill: float[3], the colour of what comes in from outside.
    """

    def chosen(name: str) -> Tensor:
        return (operation == OPERATIONS.index(name))[:, None, None, None]

    factor = (1 + sign * 0.9 * level).clamp_min(0.1)[:, None, None, None]
    gray = _gray(x)
    looked_up = _look_up(x, gray, operation, level, factor)
    x = torch.where(chosen("ColorIncreasing"), _blend(gray, x, factor), looked_up)
    x = torch.where(chosen("SharpnessIncreasing"), _blend(_smooth(x), x, factor), x)
    moved = _affine(x, _matrices(operation, level * sign, (x.shape[2], x.shape[3])), fill)
    return torch.where((operation >= OPERATIONS.index("Rotate"))[:, None, None, None], moved, x)


def _gray(x: Tensor) -> Tensor:
    """Brightness as Pillow rounds it (ITU-R 601-2), [B,1,H,W]."""
    weights = torch.tensor((19595.0, 38470.0, 7471.0), device=x.device).view(1, 3, 1, 1)
    return (((x * weights).sum(dim=1, keepdim=True) + 0x8000) / 65536).floor()


def _blend(zero: Tensor, one: Tensor, factor: Tensor) -> Tensor:
    """From ``zero`` at factor 0 through ``one`` at 1 and beyond, as Pillow cuts it to whole numbers."""
    return (zero + factor * (one - zero)).clamp(0, 255).floor()


def _smooth(x: Tensor) -> Tensor:
    """Pillow's SMOOTH filter; the outermost pixels stay."""
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=x.device) / 13
    inner = functional.conv2d(x, kernel.expand(3, 1, 3, 3), groups=3)
    out = x.clone()
    out[:, :, 1:-1, 1:-1] = (inner + 0.5).clamp(0, 255).floor()
    return out


def _look_up(x: Tensor, gray: Tensor, operation: Tensor, level: Tensor, factor: Tensor) -> Tensor:
    """The operations that map values one by one, through a table of 256 entries per sample and channel."""
    value = torch.arange(256.0, device=x.device).view(1, 1, 256).expand(len(x), 3, 256)
    index = x.flatten(2).long()
    count = torch.zeros_like(value).scatter_add_(2, index, torch.ones_like(x.flatten(2)))
    strength, by = level[:, None, None], factor[:, :, :, 0]
    mean = (gray.mean(dim=(1, 2, 3)) + 0.5).floor()[:, None, None]
    tables: dict[str, Callable[[], Tensor]] = {
        "AutoContrast": lambda: _stretch(value, count),
        "Equalize": lambda: _equalize(value, count),
        "Invert": lambda: 255 - value,
        "PosterizeIncreasing": lambda: _posterize(value, (4 - (strength * 4).floor()).clamp_min(1)),
        "SolarizeIncreasing": lambda: torch.where(value < 256 - (strength * 256).floor(), value, 255 - value),
        "SolarizeAdd": lambda: torch.where(value < 128, (value + (strength * 110).floor()).clamp_max(255), value),
        "ContrastIncreasing": lambda: _blend(mean, value, by),
        "BrightnessIncreasing": lambda: _blend(torch.zeros_like(value), value, by),
    }
    table = value
    for name, make in tables.items():
        table = torch.where((operation == OPERATIONS.index(name))[:, None, None], make(), table)
    return table.gather(2, index).view_as(x)


def _stretch(value: Tensor, count: Tensor) -> Tensor:
    """So that the least value of each channel becomes 0 and the greatest 255."""
    low = (count > 0).to(torch.int8).argmax(dim=2, keepdim=True)
    high = 255 - (count > 0).flip(2).to(torch.int8).argmax(dim=2, keepdim=True)
    scale = 255 / (high - low).clamp_min(1)
    return torch.where(high > low, ((value - low) * scale + 1e-4).floor().clamp(0, 255), value)


def _equalize(value: Tensor, count: Tensor) -> Tensor:
    """So that all values of each channel become about equally frequent, as Pillow does it in whole numbers."""
    last = count.gather(2, 255 - (count > 0).flip(2).to(torch.int8).argmax(dim=2, keepdim=True))
    step = ((count.sum(dim=2, keepdim=True) - last) / 255).floor()
    before = count.cumsum(dim=2) - count
    spread = (((step / 2).floor() + before) / step.clamp_min(1)).floor().clamp_max(255)
    return torch.where(step > 0, spread, value)


def _posterize(value: Tensor, bits: Tensor) -> Tensor:
    """Only the highest ``bits`` of 8 stay: at least one, where timm asks Pillow for none, which it refuses."""
    unit = 2 ** (8 - bits)
    return (value / unit).floor() * unit


def _matrices(operation: Tensor, amount: Tensor, size: tuple[int, int]) -> Tensor:
    """Where each pixel comes from: float32[B,2,3] that map (x, y, 1) in pixels of the result to the source."""
    height, width = size
    turn = torch.deg2rad(-30 * amount)
    cos, sin = turn.cos(), turn.sin()
    one, zero = torch.ones_like(amount), torch.zeros_like(amount)
    rotate = [cos, sin, (width - width * cos - height * sin) / 2, -sin, cos, (height + width * sin - height * cos) / 2]
    kinds = {
        "Rotate": rotate,
        "ShearX": [one, 0.3 * amount, zero, zero, one, zero],
        "ShearY": [one, zero, zero, 0.3 * amount, one, zero],
        "TranslateXRel": [one, zero, 0.45 * amount * width, zero, one, zero],
        "TranslateYRel": [one, zero, zero, zero, one, 0.45 * amount * height],
    }
    matrix = torch.stack([one, zero, zero, zero, one, zero], dim=1)
    for name, entries in kinds.items():
        matrix = torch.where((operation == OPERATIONS.index(name))[:, None], torch.stack(entries, dim=1), matrix)
    return matrix.view(-1, 2, 3)


def _affine(x: Tensor, matrix: Tensor, fill: Tensor) -> Tensor:
    """Bicubic resampling; what lies outside has the colour ``fill``."""
    height, width = x.shape[2:]
    row = torch.arange(height, device=x.device) + 0.5
    column = torch.arange(width, device=x.device) + 0.5
    y, at = torch.meshgrid(row, column, indexing="ij")
    target = torch.stack([at, y, torch.ones_like(y)], dim=-1).view(1, -1, 3)
    source = (target @ matrix.transpose(1, 2)).view(-1, height, width, 2)
    grid = source * torch.tensor((2 / width, 2 / height), device=x.device) - 1
    color = fill.to(x.device).float().view(1, 3, 1, 1)
    moved = functional.grid_sample(x - color, grid, mode="bicubic", align_corners=False) + color
    return moved.round().clamp(0, 255)
