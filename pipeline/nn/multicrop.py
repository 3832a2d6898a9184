"""Several crops of a sample, of one or more sizes, through one encoder.

Shape letters: B samples, V crops of each, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, StepContext
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, Pool, takes_image_size
from pipeline.nn.start import Start

LARGE = 2
"""Crops of the data's own size, which come first; the others may be smaller."""
Size = tuple[int, int]


def names_of(count: int) -> list[str]:
    """Of so many crops of a sample: "image", "image2", ..."""
    return ["image", *(f"image{number}" for number in range(2, count + 1))]


def crop_sizes(facts: DataFacts, objective: str) -> tuple[Size, ...]:
    """Height and width of each crop that the data gives; of two that a method needs where nobody says.

    Raises:
        ConfigError: fewer than two, or the first two are not of one size.
    """
    sizes = facts.views or (facts.image_size,) * LARGE
    if len(sizes) < LARGE or len(set(sizes[:LARGE])) > 1:
        listed = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise ConfigError(
            f"objective {objective!r} compares two large crops, and the data gives {listed}; set "
            "data.image.views = 2, or data.image.crops, whose first two have the size of data.image"
        )
    return sizes


def crop_needs(sizes: Sequence[Size], channels: int) -> dict[str, str]:
    """Fields of the batch for crops of these sizes, as ``Objective.needs`` has them."""
    letters = ["H,W" if size == sizes[0] else f"{size[0]},{size[1]}" for size in sizes]
    return {name: f"uint8[B,{channels},{size}]" for name, size in zip(names_of(len(sizes)), letters, strict=True)}


def construct_multicrop(
    config: EncoderConfig,
    sizes: Sequence[Size],
    name: str,
    *,
    start: Start | None,
    pool: Pool = "native",
    stem_of_small_images: bool = False,
    **fixed: Any,
) -> ImageEncoder:
    """As :func:`construct_encoder`; a transformer resamples its positions for crops of other sizes than the first.

    Raises:
        ConfigError: as there, or a crop does not fit the encoder's patches.
    """
    mixed = len(set(sizes)) > 1 and takes_image_size(config.encoder)
    if mixed and "dynamic_img_size" not in config.encoder_args:
        fixed["dynamic_img_size"] = True
    encoder = construct_encoder(
        config, sizes[0], name, start=start, pool=pool, stem_of_small_images=stem_of_small_images, **fixed
    )
    patch = getattr(getattr(encoder.backbone, "patch_embed", None), "patch_size", (1, 1))
    for height, width in sizes:
        if height % patch[0] or width % patch[1]:
            raise ConfigError(
                f"data.image.crops: {height}x{width} does not fit the encoder's patches of {patch[0]}x{patch[1]}"
            )
    return encoder


def encode_crops(encoder: ImageEncoder, crops: Mapping[str, Tensor], batch: Batch, ctx: StepContext) -> Tensor:
    """Features of all crops, those of the first crop of all samples first: float[V*B,D].

    Neighbours of one size go through the encoder together, so that batch norm takes their statistics together, as in
    the authors' code of SwAV and DINO.
    """
    found: list[Tensor] = []
    for _, members in groupby(crops.items(), key=lambda crop: crop[1].shape[-2:]):
        names, images = zip(*members, strict=True)
        with dropping_for(batch, ctx, f"dropout.{names[0]}"):
            found.append(encoder(torch.cat(images)))
    return torch.cat(found)
