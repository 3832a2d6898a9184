"""Colorization: which colours has a grey image?

Zhang et al., "Colorful Image Colorization" (ECCV 2016), https://arxiv.org/abs/1603.08511: colours are bins of a and b,
rare ones count more, and a picture is made by the annealed mean. With ``split_brain`` a second encoder sees the
colours and predicts lightness: Zhang et al., "Split-Brain Autoencoders" (CVPR 2017), https://arxiv.org/abs/1611.09842.
Shape letters: B samples, H height, W width, D width of an encoder, G and F rows and columns of the map, Q bins.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Clock, DataFacts, Objective, Picture, StepContext, StepOutput
from pipeline.dist.collectives import all_reduce
from pipeline.nn.construct import construct_encoder
from pipeline.nn.dropout import dropping_for
from pipeline.nn.encoder import EncoderConfig, ImageEncoder, to_weights
from pipeline.nn.images import IMAGENET_MEAN, IMAGENET_STD, tile
from pipeline.nn.lab import LIGHT_BINS, annealed_mean, colour_bins, rarity_weights, soft_bins, to_lab, to_rgb
from pipeline.nn.reading import as_map
from pipeline.nn.start import start_as_moco
from pipeline.nn.upsampling import doublings

SHOWN = 8
"""Samples in the showcase."""
SHRINK = 4
"""Of the image to the map of predicted colours, about."""
COUNTED = 2**16
"""Shares of bins are counted in whole numbers of this part: their sum is exact, whatever the order."""
LIGHT, COLOUR = ((0.5,), (0.25,)), ((0.5, 0.5), (0.1, 0.1))
"""Mean and standard deviation of what the encoders see, of lightness / 100, and of a and b / 220 + 1/2."""


class Config(EncoderConfig):
    """Settings of colorization; ``encoder`` sees lightness, or with ``split_brain`` each of two sees a half."""

    encoder: str = "resnet50"
    small_stem: bool = False
    """The stem for images of 32 pixels."""
    split_brain: bool = False
    """Predict lightness from colours too, by an encoder of its own; features are those of both side by side."""
    hidden: Annotated[int, Field(ge=1)] = 256
    """Width between encoder and prediction."""
    uniform_part: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Lambda of the rebalancing: 1 counts all colours alike, near 0 each bin as much as any other."""
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.38
    """Of the annealed mean, in pictures."""

    @model_validator(mode="after")
    def _own_channels(self) -> Config:
        if (self.mean, self.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError("colorization normalises lightness and colour itself; leave out 'mean' and 'std'")
        return self


class Wanted(NamedTuple):
    """What is to be predicted of a batch, at the places of the map."""

    index: Tensor
    """int64[B,5,G,F], the nearest bins, nearest first."""
    share: Tensor
    """float32[B,5,G,F]."""
    light: Tensor
    """int64[B,G,F], the bin of lightness."""


class Colorization(Objective):
    """Encoder of lightness, doublings of its last map, a classifier of colours at each place."""

    bins: Tensor
    seen: Tensor

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.needs = {"image": "uint8[B,3,H,W]"}
        self.light = self._encoder(LIGHT, facts)
        grid, count = _geometry(self.light, facts.image_size)
        self.grid = grid
        bins = colour_bins()
        self.to_colour = _head(self.light.backbone.num_features, config.hidden, count, len(bins))
        self.colour = self.to_light = None
        if config.split_brain:
            self.colour = self._encoder(COLOUR, facts)
            self.to_light = _head(self.colour.backbone.num_features, config.hidden, count, LIGHT_BINS)
        self.register_buffer("bins", bins, persistent=False)
        self.register_buffer("seen", torch.zeros(len(bins), dtype=torch.int64))
        self._fresh: list[Tensor] = []

    def _encoder(self, channels: tuple[tuple[float, ...], tuple[float, ...]], facts: DataFacts) -> ImageEncoder:
        own = self.config.model_copy(update={"mean": channels[0], "std": channels[1]})
        return construct_encoder(
            own,
            facts.image_size,
            "colorization",
            start=start_as_moco,
            pool="mean",
            stem_of_small_images=self.config.small_stem,
            global_pool="",
        )

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Rebalanced cross-entropy; "top1": of places whose bin is told. Split: plus the cross-entropy of lightness."""
        lab = to_lab(batch["image"])
        wanted = self.wanted(lab)
        with dropping_for(batch, ctx):
            features, logits = self._predict(self.light, self.to_colour, lightness(lab))
        losses = self._colour_losses(logits, wanted)
        hit = (logits.detach().argmax(dim=1) == wanted.index[:, 0]).float()
        metrics = {"top1": hit.mean()}
        if self.colour is not None and self.to_light is not None:
            with dropping_for(batch, ctx, "dropout.colour"):
                other, lights = self._predict(self.colour, self.to_light, colours(lab))
            losses = losses + functional.cross_entropy(lights, wanted.light, reduction="none").mean(dim=(1, 2))
            metrics["top1_light"] = (lights.detach().argmax(dim=1) == wanted.light).float().mean()
            features = torch.cat([features, other], dim=1)
        if self.training:
            self._fresh.append(self._count(wanted))
        return StepOutput(losses.mean(), metrics, losses.detach(), features.detach())

    def wanted(self, lab: Tensor) -> Wanted:
        """Bins of float32[B,3,H,W] at the places of the map."""
        rows, columns = (
            ((torch.arange(n, device=lab.device) + 0.5) * side / n).long()
            for n, side in zip(self.grid, lab.shape[2:], strict=True)
        )
        small = lab[:, :, rows[:, None], columns]
        ab = small[:, 1:].permute(0, 2, 3, 1).reshape(-1, 2)
        index, share = (x.view(len(lab), *self.grid, -1).permute(0, 3, 1, 2) for x in soft_bins(ab, self.bins.float()))
        return Wanted(index, share, small[:, 0].long().clamp(0, LIGHT_BINS - 1))

    def _predict(self, encoder: ImageEncoder, head: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features float[B,D], and logits float32[B,Q,G,F]."""
        found = as_map(encoder.backbone, encoder.backbone(to_weights(encoder.normalize(x), encoder.backbone)))
        return found.mean(dim=(2, 3)), head(found).float()

    def _colour_losses(self, logits: Tensor, wanted: Wanted) -> Tensor:
        """float32[B]: cross-entropy with the shared-out targets, each place weighted by its nearest bin."""
        counted = self.seen.double() + 1
        weight = rarity_weights(counted / counted.sum(), self.config.uniform_part).float()
        log_p = logits.log_softmax(dim=1).gather(1, wanted.index)
        return -((wanted.share * log_p).sum(dim=1) * weight[wanted.index[:, 0]]).mean(dim=(1, 2))

    def _count(self, wanted: Wanted) -> Tensor:
        """How often the bins of a batch were wanted, int64[Q]."""
        shares = (wanted.share * COUNTED).round().long().flatten()
        return torch.zeros_like(self.seen, dtype=torch.int64).index_add_(0, wanted.index.flatten(), shares)

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        """Add the colours of the step's global batch to those seen: once per update, the same on all ranks."""
        if self._fresh:
            self.seen += all_reduce(torch.stack(self._fresh).sum(dim=0))
        self._fresh = []

    def encoders(self) -> dict[str, nn.Module]:
        """Of colour images, what the encoders see of them: the mean over places of the last map."""
        return {"image": LabEncoder(self.light, self.colour)}

    def no_weight_decay(self) -> set[str]:
        """What timm names for the backbones: positions and class token."""
        colour = set() if self.colour is None else self.colour.no_weight_decay("colour.")
        return self.light.no_weight_decay("light.") | colour

    def inputs(self, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The image, its lightness, and for split-brain its colours at one lightness."""
        lab = to_lab(batch["image"])
        seen = {"image": batch["image"], "lightness": _shown(lab[:, :1], torch.zeros_like(lab[:, 1:]))}
        if self.colour is not None:
            seen["colours"] = _shown(torch.full_like(lab[:, :1], 65), lab[:, 1:])
        return seen

    def showcase(self, batch: Batch, ctx: StepContext) -> dict[str, Picture]:
        """Rows: original, what is seen, the colours that are wanted, and those that are predicted, on its lightness."""
        batch = {name: value[:SHOWN] for name, value in batch.items()}
        lab = to_lab(batch["image"])
        wanted = self.wanted(lab)
        with dropping_for(batch, ctx):
            _, logits = self._predict(self.light, self.to_colour, lightness(lab))
        bins = self.bins.float()
        rows = [batch["image"], _shown(lab[:, :1], torch.zeros_like(lab[:, 1:]))]
        for ab in (bins[wanted.index[:, 0]].permute(0, 3, 1, 2), annealed_mean(logits, bins, self.config.temperature)):
            rows.append(_shown(lab[:, :1], functional.interpolate(ab, size=lab.shape[2:], mode="nearest")))
        hits = float((logits.argmax(dim=1) == wanted.index[:, 0]).float().mean())
        caption = "Original; what is seen; the colours that are asked for, in bins; what is predicted "
        return {
            "colours": Picture(tile(rows), caption + f"({hits:.0%} of the places have the right bin of {len(bins)})")
        }


class LabEncoder(nn.Module):
    """uint8[B,3,H,W] to features of its lightness, and of its colours where there is an encoder for them.

    Shares the modules it is given.
    """

    def __init__(self, light: ImageEncoder, colour: ImageEncoder | None) -> None:
        super().__init__()
        self.light, self.colour = light, colour

    @property
    def dim(self) -> int:
        """Size of a feature vector."""
        return self.light.dim + (0 if self.colour is None else self.colour.dim)

    def forward(self, image: Tensor) -> Tensor:
        """Features of a batch, float[B,D]."""
        lab = to_lab(image)
        parts = [self.light(lightness(lab))]
        if self.colour is not None:
            parts.append(self.colour(colours(lab)))
        return torch.cat(parts, dim=1)


def lightness(lab: Tensor) -> Tensor:
    """float32[B,1,H,W] from 0 to 1."""
    return lab[:, :1] / 100


def colours(lab: Tensor) -> Tensor:
    """float32[B,2,H,W], a and b, from 0 to 1."""
    return lab[:, 1:] / 220 + 0.5


def _shown(light: Tensor, ab: Tensor) -> Tensor:
    return to_rgb(torch.cat([light, ab], dim=1))


@torch.no_grad()
def _geometry(encoder: ImageEncoder, image_size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Rows and columns of the map of colours, and by how many doublings it follows from the encoder's last map.

    Raises:
        ConfigError: the encoder gives no map.
    """
    backbone: Any = encoder.backbone
    training = backbone.training
    found = as_map(backbone, backbone.eval()(torch.zeros(1, len(encoder.normalize.mean), *image_size)))
    backbone.train(training)
    rows, columns = found.shape[2:]
    if found.shape[1] != backbone.num_features:
        raise ConfigError(f"objective.encoder: the last map has {found.shape[1]} channels, not {backbone.num_features}")
    count = max(0, round(math.log2(image_size[0] / SHRINK / rows)))
    return (rows * 2**count, columns * 2**count), count


def _head(width: int, hidden: int, count: int, classes: int) -> nn.Sequential:
    """Float[B,D,...] to logits of a map that is doubled ``count`` times."""
    return nn.Sequential(
        nn.Conv2d(width, hidden, 1), nn.ReLU(), doublings([hidden] * (count + 1)), nn.Conv2d(hidden, classes, 1)
    )
