"""BYOL: one view predicts what a slowly moving copy of the network makes of the other view; there are no negatives.

Grill et al., "Bootstrap your own latent: A new approach to self-supervised Learning" (NeurIPS 2020),
https://arxiv.org/abs/2006.07733. Shape letters: B samples, D width of the encoder, E width of the projection.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.core.protocols import Average, Clock, DataFacts, Embeddings, StepContext, StepOutput
from pipeline.nn.followers import cosine_to_one, follower, following
from pipeline.nn.projection import projection
from pipeline.nn.start import lecun_normal
from pipeline.nn.two_views import TwoViewConfig, TwoViewObjective, cosines_of


class Config(TwoViewConfig):
    """Settings of BYOL; the defaults are those of the paper's 1,000 epochs."""

    hidden: Annotated[int, Field(ge=1)] = 4096
    """Width inside projector and predictor."""
    dim: Annotated[int, Field(ge=1)] = 256
    """E."""
    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    """What the target keeps of itself in the first update; it rises to 1 on half a cosine."""


class BYOL(TwoViewObjective):
    """Encoder, projector and predictor; the target is a copy of the first two.

    The loss is a mean over samples, but batch norm, which its heads cannot do without, takes the statistics of a
    micro-batch over all ranks, so recipes accumulate nothing. Biases before batch norm, which the authors' code has,
    change nothing and are left out.
    """

    compares = False

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "byol")
        self.config = config
        self.head = projection([self.encoder.dim, config.hidden, config.dim], norm=True)
        self.predictor = projection([config.dim, config.hidden, config.dim], norm=True)
        for layer in (*self.head, *self.predictor):
            if isinstance(layer, nn.Linear):  # as haiku draws them
                lecun_normal(layer.weight)
        self.target = nn.ModuleDict({"encoder": follower(self.encoder), "head": follower(self.head)})

    def encode(self, view: Tensor) -> dict[str, Tensor]:
        """Unit vectors float32[B,E]: "prediction", and "target" without gradient."""
        features = self.encoder(view)
        prediction = self.predictor(self.head(features))
        with torch.no_grad():
            target = self.target["head"](self.target["encoder"](view))
        unit = {"prediction": prediction, "target": target}
        return {"features": features.detach()} | {k: functional.normalize(x.float(), dim=1) for k, x in unit.items()}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """Squared distance of unit vectors, 2 - 2 cos, of both directions; "agreement" is the mean cosine."""
        rows = embeddings.rows
        cosines = [(rows[p] * rows[t]).sum(dim=1) for p, t in (("prediction", "target2"), ("prediction2", "target"))]
        both = torch.stack(cosines)
        losses = (2 - 2 * both).sum(dim=0)
        agreement = {"agreement": both.detach().mean()}
        return StepOutput(losses.mean(), agreement, losses.detach(), rows["features"].detach())

    def averages(self, clock: Clock) -> Iterable[Average]:
        """The target."""
        keep = cosine_to_one(self.config.momentum, clock.progress)
        for name, source in (("encoder", self.encoder), ("head", self.head)):
            yield from following(self.target[name], source, keep)

    def agreement(self, rows: dict[str, Tensor]) -> Tensor:
        """Of predictions and targets."""
        return cosines_of(rows["prediction"], rows["target2"])
