"""Relative patch location: where, around one tile of an image, does another one lie?

Doersch et al., "Unsupervised Visual Representation Learning by Context Prediction" (ICCV 2015),
https://arxiv.org/abs/1505.05192. All eight neighbours of the middle tile are asked for, and a ResNet's head is that of
its later reproductions (one hidden layer). Shape letters: B samples, T = 9 tiles, C channels, P side of a tile, D width
of the encoder.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.projection import hidden_layers
from pipeline.nn.tile_encoder import construct_tile_encoder, encode_tiles, normalised_tiles
from pipeline.nn.tiles import TILES, Tiling

MIDDLE = TILES // 2
AROUND = [tile for tile in range(TILES) if tile != MIDDLE]
PLACES = ("above left", "above", "above right", "left", "right", "below left", "below", "below right")
SHOWN = 3
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of relative patch location; the defaults are for images of 255 pixels."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    tiles: Tiling = Tiling(size=64, jitter=21, colour="drop")
    hidden: Annotated[int, Field(ge=1)] = 4096
    """Width inside the head."""
    head_norm: bool = True
    """Batch norm over all ranks inside the head."""


class RelativePatch(OneEncoder, Objective):
    """Encoder of single tiles, and a head that is given two of them side by side."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.encoder = construct_tile_encoder(
            config, facts.image_size, "relative_patch", config.tiles, small_stem=config.small_stem
        )
        hidden = hidden_layers([2 * self.encoder.dim, config.hidden], norm=config.head_norm)
        self.head = nn.Sequential(*hidden, nn.Linear(config.hidden, len(AROUND)))

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropy over the places of the eight neighbours; "top1" is how many are told rightly (chance: 1/8)."""
        features = encode_tiles(self.encoder, self.tiles(batch, ctx), batch, ctx)
        logits = self.logits(features)
        count = len(batch["id"])
        place = torch.arange(len(AROUND), device=logits.device)[:, None].expand(-1, count)
        losses = functional.cross_entropy(logits.flatten(0, 1), place.flatten(), reduction="none").view_as(place)
        top1 = (logits.detach().argmax(dim=2) == place).float().mean()
        return StepOutput(losses.mean(), {"top1": top1}, losses.detach().mean(dim=0), features.detach()[MIDDLE])

    def tiles(self, batch: Batch, ctx: StepContext) -> Tensor:
        """Normalised, in their order in the image: float32[B,T,C,P,P]."""
        return normalised_tiles(self.encoder, batch, ctx, "relative_patch", self.config.tiles)

    def logits(self, features: Tensor) -> Tensor:
        """Features of the tiles, float[T,B,D], to float32[8,B,8]: of each neighbour, for each place."""
        neighbours = features[AROUND]
        both = torch.cat([features[MIDDLE].expand_as(neighbours), neighbours], dim=2)
        return self.head(both.flatten(0, 1)).float().unflatten(0, both.shape[:2])

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and its tiles as they are seen."""
        tiles = self.encoder.normalize.invert(self.tiles(batch, ctx))
        return {"image": batch["image"]} | {f"tile {place}": tiles[:, place] for place in range(TILES)}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Of a few images the middle tile, and its neighbours with the places that they are put to."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        tiles = self.tiles(batch, ctx)
        guess = self.logits(encode_tiles(self.encoder, tiles, batch, ctx)).argmax(dim=2).T
        shown, rows, notes = self.encoder.normalize.invert(tiles), [], []
        for sample, places in enumerate(guess.tolist()):
            rows.append(shown[sample, [MIDDLE, *AROUND]])
            told = [Line(PLACES[place], verdict(place == true)) for true, place in enumerate(places)]
            notes.append([Line("the middle"), *told])
        titles = [f"image {sample + 1}: where do these lie? ({', '.join(PLACES)})" for sample in range(len(rows))]
        hits = float((guess == torch.arange(len(AROUND), device=guess.device)).float().mean())
        return {
            "places": Picture(
                beneath(titles, rows, notes), f"{hits:.0%} of the places are told rightly; chance is 12 %"
            )
        }
