"""Encoders that are trained on tiles and used on whole images.

Shape letters: B samples, T tiles, C channels, P side of a tile, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, StepContext
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, takes_image_size
from pipeline.nn.start import start_as_moco
from pipeline.nn.tiles import Tiling, close_shortcuts, cut_tiles, some_grey


def construct_tile_encoder(
    config: EncoderConfig, image_size: tuple[int, int], name: str, tiling: Tiling, *, small_stem: bool
) -> ImageEncoder:
    """An encoder for images of ``image_size`` that takes tiles too; transformers resample their positions for them.

    Raises:
        ConfigError: tiles do not fit the images, or the encoder cannot take images of their size.
    """
    tiling.fit(image_size, len(config.mean))
    fixed: dict[str, Any] = {"dynamic_img_size": True} if takes_image_size(config.encoder) else {}
    encoder = construct_encoder(config, image_size, name, start=start_as_moco, stem_of_small_images=small_stem, **fixed)
    training = encoder.training
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, len(config.mean), tiling.size, tiling.size))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"objective.tiles.size: {config.encoder!r} cannot take tiles of {tiling.size}x{tiling.size} pixels: "
            f"{error or repr(error)}"
        ) from error
    encoder.train(training)
    return encoder


def normalised_tiles(encoder: ImageEncoder, batch: Batch, ctx: StepContext, name: str, tiling: Tiling) -> Tensor:
    """The tiles of a batch as the encoder sees them, in their order in the image: float32[B,T,C,P,P]."""
    image, random = batch["image"], ctx.random(batch, f"{name}.tiles")
    if tiling.grey:
        image = some_grey(image, random, tiling)
    tiles = encoder.normalize(cut_tiles(image, random, tiling))
    return close_shortcuts(tiles, random, tiling, encoder.normalize.std)


def encode_tiles(encoder: ImageEncoder, tiles: Tensor, batch: Batch, ctx: StepContext) -> Tensor:
    """[B,T,C,P,P] to features, float[T,B,D]: of the first tile of all samples, then of the second, and so on."""
    count = tiles.shape[1]
    with dropping_for(batch, ctx):
        return encoder.features(tiles.transpose(0, 1).flatten(0, 1)).unflatten(0, (count, -1))
