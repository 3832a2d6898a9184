"""Jigsaw puzzles: which of a few permutations were the tiles of the image put in?

Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles" (ECCV 2016),
https://arxiv.org/abs/1603.09246: the same encoder for every tile, and a head that is given all of them in their
shuffled order. Shape letters: B samples, T = 9 tiles, C channels, P side of a tile, D width, K permutations.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.permutations import distant_permutations
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.projection import hidden_layers
from pipeline.nn.tile_encoder import construct_tile_encoder, encode_tiles, normalised_tiles
from pipeline.nn.tiles import SIDE, TILES, Tiling

SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of jigsaw puzzles; the defaults are for images of 255 pixels."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    permutations: Annotated[int, Field(ge=2, le=math.factorial(TILES))] = 1000
    """K."""
    tiles: Tiling = Tiling(size=64, jitter=21, grey=0.3, shift=2, standardise=True)
    tile_dim: Annotated[int, Field(ge=1)] = 1000
    """Numbers that the head is given of each tile."""
    hidden: Annotated[int, Field(ge=1)] | None = None
    """Width of a layer behind all tiles (4096 in the paper's AlexNet); left out: none, as ResNets had it later."""
    head_norm: bool = True
    """Batch norm over all ranks inside the head."""


class Jigsaw(OneEncoder, Objective):
    """Encoder of single tiles, and a head that knows the tiles by their order."""

    permutations: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.config = config
        self.encoder = construct_tile_encoder(
            config, facts.image_size, "jigsaw", config.tiles, small_stem=config.small_stem
        )
        norm, width = config.head_norm, TILES * config.tile_dim
        self.each = nn.Sequential(*hidden_layers([self.encoder.dim, config.tile_dim], norm=norm))
        hidden = [] if config.hidden is None else hidden_layers([width, config.hidden], norm=norm)
        self.head = nn.Sequential(*hidden, nn.Linear(config.hidden or width, config.permutations))
        # Not persistent: it follows from their number.
        self.register_buffer("permutations", distant_permutations(config.permutations, TILES), persistent=False)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropy over the permutations; "top1" is how many puzzles are solved."""
        tiles, which = self.puzzles(batch, ctx)
        features = encode_tiles(self.encoder, tiles, batch, ctx)
        logits = self.logits(features)
        losses = functional.cross_entropy(logits, which, reduction="none")
        top1 = (logits.detach().argmax(dim=1) == which).float().mean()
        return StepOutput(losses.mean(), {"top1": top1}, losses.detach(), features.detach()[0])

    def puzzles(self, batch: Batch, ctx: StepContext) -> tuple[Tensor, Tensor]:
        """Shuffled tiles, float32[B,T,C,P,P], and the number of the permutation, int64[B].

        Where permutation p is drawn, place k holds the tile of place p[k] of the image.
        """
        tiles = normalised_tiles(self.encoder, batch, ctx, "jigsaw", self.config.tiles)
        which = ctx.random(batch, "jigsaw.permutation").integers(0, len(self.permutations), 1).squeeze(1)
        samples = torch.arange(len(tiles), device=tiles.device)[:, None]
        return tiles[samples, self.permutations[which]], which

    def logits(self, features: Tensor) -> Tensor:
        """Features of the shuffled tiles, float[T,B,D], to float32[B,K]."""
        each = self.each(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return self.head(each.transpose(0, 1).flatten(1)).float()

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, and the puzzle that is made of it."""
        return {"image": batch["image"], "puzzle": self._laid_out(self.puzzles(batch, ctx)[0])}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Image, puzzle, and how it is put together."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        tiles, which = self.puzzles(batch, ctx)
        guess = self.logits(encode_tiles(self.encoder, tiles, batch, ctx)).argmax(dim=1)
        samples = torch.arange(len(tiles), device=tiles.device)[:, None]
        solved = tiles[samples, self.permutations[guess].argsort(dim=1)]
        right = (guess == which).tolist()
        rows = [batch["image"], self._laid_out(tiles), self._laid_out(solved)]
        plain, told = [Line(" ")] * len(right), [Line("right" if hit else "wrong", verdict(hit)) for hit in right]
        titles = ["the image", "its tiles, shuffled", "put together again"]
        caption = f"{sum(right)} of {len(right)} puzzles are solved, each one of {len(self.permutations)} permutations"
        return {"puzzles": Picture(beneath(titles, rows, [plain, plain, told]), caption)}

    def _laid_out(self, tiles: Tensor) -> Tensor:
        """Normalised tiles as one picture, with lines between them: uint8[B,C,3P+2,3P+2]."""
        shown = functional.pad(self.encoder.normalize.invert(tiles), (0, 1, 0, 1), value=255)
        b, _, c, side, _ = shown.shape
        grid = shown.view(b, SIDE, SIDE, c, side, side).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(b, c, SIDE * side, SIDE * side)[:, :, :-1, :-1]
