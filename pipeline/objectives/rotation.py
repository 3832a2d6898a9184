"""Rotation prediction: by how many quarter turns was the image turned?

Gidaris et al., "Unsupervised Representation Learning by Predicting Image Rotations" (ICLR 2018),
https://arxiv.org/abs/1803.07728. All four copies of an image are in the batch, as its authors found best.
Shape letters: B samples, C channels, H height and width, D width of the encoder.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig
from pipeline.nn.one_encoder import OneEncoder
from pipeline.nn.pictures import Line, beneath, verdict
from pipeline.nn.start import start_as_moco

TURNS = 4
SHOWN = 8
"""Samples in the showcase."""


class Config(EncoderConfig):
    """Settings of rotation prediction."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""


class Rotation(OneEncoder, Objective):
    """Encoder and a linear classifier of four turns; each counts against the clock."""

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        height, width = facts.image_size
        if height != width:
            raise ConfigError(
                f"data.image.size: images of {height}x{width} cannot be turned by 90 degrees; make them square"
            )
        self.needs = {"image": f"uint8[B,{len(config.mean)},H,W]"}
        self.encoder = construct_encoder(
            config, facts.image_size, "rotation", start=start_as_moco, stem_of_small_images=config.small_stem
        )
        self.head = nn.Linear(self.encoder.dim, TURNS)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Cross-entropy over the four turns of each image; "top1" is the part of the copies that are told rightly."""
        with dropping_for(batch, ctx):
            features = self.encoder(turned(batch["image"]))
        logits = self.head(features).float()
        count = len(batch["id"])
        turn = torch.arange(TURNS, device=logits.device).repeat_interleave(count)
        losses = functional.cross_entropy(logits, turn, reduction="none").view(TURNS, count).mean(dim=0)
        top1 = (logits.detach().argmax(dim=1) == turn).float().mean()
        return StepOutput(losses.mean(), {"top1": top1}, losses.detach(), features.detach()[:count])

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image in its four positions."""
        copies = turned(batch["image"]).chunk(TURNS)
        return {"image": copies[0]} | {f"turned {90 * turn}": copies[turn] for turn in range(1, TURNS)}

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Each image in one position, and what it is taken for."""
        image = batch["image"][:SHOWN]
        turn = torch.arange(len(image), device=image.device) % TURNS
        seen = torch.stack([torch.rot90(x, int(k), (1, 2)) for x, k in zip(image, turn, strict=True)])
        own = {name: value[:SHOWN] for name, value in batch.items()}
        with dropping_for(own, ctx):
            guess = self.head(self.encoder(seen)).argmax(dim=1)
        notes = [Line(f"{90 * int(g)} deg", verdict(bool(g == t))) for g, t in zip(guess, turn, strict=True)]
        titles = ["the image", "turned, and by how much it is thought to be"]
        hits = float((guess == turn).float().mean())
        picture = beneath(titles, [image, seen], [[Line(" ")] * len(image), notes])
        return {"rotation": Picture(picture, f"Turned by 0, 90, 180, 270 degrees in turn; {hits:.0%} are told rightly")}


def turned(image: Tensor) -> Tensor:
    """[B,C,H,H] to [4B,C,H,H]: as it is, then turned by one, two and three quarters."""
    return torch.cat([torch.rot90(image, turn, (2, 3)) for turn in range(TURNS)])
