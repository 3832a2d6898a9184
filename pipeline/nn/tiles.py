"""Tiles out of a grid of cells, and what keeps their places from being read off anything but their content.

Neighbouring tiles would be told by lines that go on across their border: so there are gaps between them, of random
width. Cheap lenses shift colours away from the middle of the picture, so that a patch betrays its place by its fringes
(chromatic aberration): so colours are dropped, projected, or shifted at random. Doersch et al., "Unsupervised Visual
Representation Learning by Context Prediction" (ICCV 2015), section 3.1; Noroozi and Favaro, "Unsupervised Learning of
Visual Representations by Solving Jigsaw Puzzles" (ECCV 2016), section 4.2. Shape letters: B samples, C channels,
H height, W width, T tiles, P side of a tile.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from pipeline.config.schema import Strict
from pipeline.config.strict import Positive
from pipeline.core.errors import ConfigError
from pipeline.core.random import SampleRandom
from pipeline.nn.augment import grey

SIDE = 3
"""Cells of the grid in a row, and rows."""
TILES = SIDE**2
GREEN_AGAINST_MAGENTA = (-1.0, 2.0, -1.0)
"""The axis along which lenses shift colours."""
NOISE = 0.01
"""Standard deviation of what stands in for dropped channels, of the normalised image's (Doersch et al.)."""


class Tiling(Strict):
    """Which tiles are cut, and what is done to their colours."""

    size: Positive
    """P, in pixels; what a cell has more is the gap to the next one, on average."""
    jitter: Annotated[int, Field(ge=0)] = 0
    """Pixels over which a tile's place in its cell is drawn, in each direction; at most the cell's side less P."""
    colour: Literal["keep", "drop", "project"] = "keep"
    """Of each tile: leave all channels, leave one (drawn at random) and put noise for the others, or leave out what
    lies along the axis from green to magenta."""
    grey: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Part of the images that are made grey, all tiles alike."""
    shift: Annotated[int, Field(ge=0)] = 0
    """Pixels by which each channel of a tile is moved by itself, at most, in each direction."""
    standardise: bool = False
    """Give every tile zero mean and unit standard deviation of its own, per channel, so that brightness and contrast
    do not go on from tile to tile."""

    def fit(self, image_size: tuple[int, int], channels: int) -> None:
        """Hold the settings against the images.

        Raises:
            ConfigError: tiles or their jitter are larger than a cell, or there are no colours to change.
        """
        if channels != 3 and (self.colour != "keep" or self.grey):
            raise ConfigError(
                f"objective.tiles: 'colour' and 'grey' change images of 3 channels, not of {channels}; leave them out"
            )
        cell = min(image_size) // SIDE
        if self.size + self.jitter > cell:
            raise ConfigError(
                f"objective.tiles: size {self.size} and jitter {self.jitter} need cells of {self.size + self.jitter} "
                f"pixels, but images of {image_size[0]}x{image_size[1]} have {SIDE}x{SIDE} cells of {cell}; "
                "make data.image.size larger, or tiles smaller"
            )


def cut_tiles(image: Tensor, random: SampleRandom, tiling: Tiling) -> Tensor:
    """The tiles of each image, row by row.

    Args:
        image: [B,C,H,W].
        random: numbers of the samples.
        tiling: see there.

    Returns:
        [B,T,C,P,P], of the type of ``image``.
    """
    b, c, height, width = image.shape
    cells = height // SIDE, width // SIDE
    corners: list[Tensor] = []
    for axis, (cell, side) in enumerate(zip(cells, (height, width), strict=True)):
        place = torch.arange(TILES, device=image.device)
        place = place // SIDE if axis == 0 else place % SIDE
        first = (side - SIDE * cell) // 2 + cell * place + (cell - tiling.size - tiling.jitter) // 2
        corner = first + random.integers(0, tiling.jitter + 1, TILES)
        shift = random.integers(-tiling.shift, tiling.shift + 1, TILES, c)
        corners.append((corner[:, :, None] + shift).clamp(0, side - tiling.size))
    offset = torch.arange(tiling.size, device=image.device)
    rows, columns = (corner[..., None] + offset for corner in corners)  # [B,T,C,P]
    samples = torch.arange(b, device=image.device)[:, None, None, None, None]
    channels = torch.arange(c, device=image.device)[:, None, None]
    return image[samples, channels, rows[..., None], columns[..., None, :]]


def some_grey(image: Tensor, random: SampleRandom, tiling: Tiling) -> Tensor:
    """Images of which some have lost their colours, uint8[B,3,H,W]."""
    chosen = random.uniform() < tiling.grey
    return torch.where(chosen[:, None, None, None], grey(image.float()).round().to(image.dtype), image)


def close_shortcuts(tiles: Tensor, random: SampleRandom, tiling: Tiling, std: Tensor) -> Tensor:
    """Change the colours of normalised tiles.

    Args:
        tiles: float32[B,T,3,P,P], normalised.
        random: numbers of the samples.
        tiling: see there.
        std: float32[3,1,1], by which the channels were divided.

    Returns:
        float32[B,T,3,P,P].
    """
    t, c = tiles.shape[1:3]
    if tiling.colour == "drop":
        kept = random.integers(0, c, t, 1) == torch.arange(c, device=tiles.device)
        noise = NOISE * random.normal(t, *tiles.shape[2:])
        tiles = torch.where(kept[..., None, None], tiles, noise)
    elif tiling.colour == "project":
        axis = tiles.new_tensor(GREEN_AGAINST_MAGENTA)
        away = torch.eye(c, device=tiles.device) - torch.outer(axis, axis) / (axis @ axis)
        with torch.autocast(tiles.device.type, enabled=False):
            tiles = torch.einsum("oc,btchw->btohw", away, tiles * std) / std  # the axis is one of plain colours
    if tiling.standardise:
        spread, mean = torch.std_mean(tiles, dim=(3, 4), keepdim=True, correction=0)
        tiles = (tiles - mean) / (spread + 1e-5)
    return tiles
