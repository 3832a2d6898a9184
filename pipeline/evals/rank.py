"""How much of their space features fill: no labels needed, so it can be watched wherever there are images.

- RankMe: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations by
  Their Rank" (ICML 2023), eq. 1: exp of the entropy of the singular values, divided by their sum.
- Alignment and uniformity: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
  Uniformity on the Hypersphere" (ICML 2020), with alpha = 2 and t = 2. The pairs that should lie close are an image and
  its mirror image, so that no augmentation has to be agreed on.

Shape letters: N samples, D width.
"""

import math
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.nn.spread import rankme, std_of_units

ROWS = 1024
"""Rows of the matrix of all pairs that are held at once."""


class Config(Strict):
    """Settings of the rank."""

    test: str = "val"
    """Stream of images."""
    mirror: bool = True
    """Encode mirror images too, for the alignment; it doubles the cost."""


class Rank(Evaluation):
    """Reports "rank/rankme", "rank/spread", "rank/uniformity" and "rank/alignment".

    "rank/rankme" lies between 1 (all features on a line) and the smaller of N and D; "rank/spread" is the mean over
    dimensions of the standard deviation of unit vectors times the root of D: 1 where they fill the sphere evenly and 0
    where all are one point, which is collapse.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Images alone."""
        return Uses({self.config.test: ("image",)})

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """Extract on all ranks, and measure what all know."""
        name, x = self.config.test, ctx.features("image", self.config.test, fields=()).x
        unit = functional.normalize(x)
        yield Number("rank/rankme", rankme(x), len(x), name)
        yield Number("rank/spread", std_of_units(unit), len(x), name)
        if len(x) > 1:
            yield Number("rank/uniformity", uniformity(unit), len(x), name, better="lower")
        if self.config.mirror:
            mirrored = Mirrored(ctx.encoders["image"])
            other = functional.normalize(ctx.features("image, mirrored", name, fields=(), module=mirrored).x)
            distance = (unit.double() - other.double()).square().sum(dim=1)
            error = float(distance.std()) / math.sqrt(len(x)) if len(x) > 1 else None
            value, each = float(distance.mean()), distance.float().numpy()
            yield Number("rank/alignment", value, len(x), name, error, better="lower", samples=each)


class Mirrored(nn.Module):
    """An encoder that sees mirror images."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, image: Tensor) -> Tensor:
        """[B,C,H,W] to [B,D]."""
        return self.encoder(image.flip(-1))


def uniformity(unit: Tensor) -> float:
    """log of the mean of exp(-2 |x - y|^2) over all pairs of different samples, of unit vectors [N,D], N > 1."""
    total, n = 0.0, len(unit)
    for rows in unit.double().split(ROWS):
        total += float((4 * (rows @ unit.double().T - 1)).exp().sum())
    return math.log((total - n) / (n * (n - 1)))
