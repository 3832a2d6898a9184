"""VICReg: two views are to be alike, every feature is to vary over the batch, and no two features together.

Bardes, Ponce and LeCun, "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning" (ICLR
2022), https://arxiv.org/abs/2105.04906. Shape letters: B samples, N of the global batch, E width of the embedding.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from pipeline.core.protocols import DataFacts, Embeddings, StepContext, StepOutput
from pipeline.dist.collectives import global_covariance
from pipeline.nn.projection import projection
from pipeline.nn.two_views import TwoViewConfig, TwoViewObjective, cosines_of

EPS = 1e-4
"""Added to variances before the root, whose slope is infinite at 0 (equation 1)."""
Weight = Annotated[float, Field(ge=0)]


class Config(TwoViewConfig):
    """Settings of VICReg; the defaults are the paper's."""

    hidden: Annotated[int, Field(ge=1)] = 8192
    """Width inside the expander."""
    dim: Annotated[int, Field(ge=1)] = 8192
    """E."""
    invariance: Weight = 25.0
    """Weight of the mean squared difference of the two views (lambda); below, mu and nu."""
    variance: Weight = 25.0
    covariance: Weight = 1.0
    deviation: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation that each feature is to have at least (gamma)."""


class VICReg(TwoViewObjective):
    """Encoder and expander of three layers. Variance and covariance are the global batch's, however it is cut.

    Biases before batch norm, which the authors' code has, change nothing and are left out.
    """

    def __init__(self, config: Config, facts: DataFacts) -> None:
        super().__init__(config, facts, "vicreg")
        self.config = config
        self.head = projection([self.encoder.dim, config.hidden, config.hidden, config.dim], norm=True)

    def encode(self, view: Tensor) -> dict[str, Tensor]:
        """ "embedding", float[B,E]."""
        features = self.encoder(view)
        return {"features": features.detach(), "embedding": self.head(features)}

    def loss(self, embeddings: Embeddings, ctx: StepContext) -> StepOutput:
        """The weighted sum; its three parts are metrics, unweighted."""
        rows, config = embeddings.rows, self.config
        first, second = rows["embedding"].float(), rows["embedding2"].float()
        terms = [_spread(x, config.deviation) for x in (first, second)]
        invariance = (first - second).square().mean()
        variance = (terms[0][0] + terms[1][0]) / 2
        covariance = terms[0][1] + terms[1][1]
        metrics = {"invariance": invariance, "variance": variance, "covariance": covariance}
        total = config.invariance * invariance + config.variance * variance + config.covariance * covariance
        told = {name: value.detach() for name, value in metrics.items()}
        return StepOutput(total, told, features=rows["features"].detach())

    def agreement(self, rows: dict[str, Tensor]) -> Tensor:
        """Of embeddings."""
        return cosines_of(rows["embedding"], rows["embedding2"])


def _spread(x: Tensor, deviation: float) -> tuple[Tensor, Tensor]:
    """Of one view over the global batch, float32[B,E]: what deviations lack, and squared covariances over E."""
    covariance = global_covariance(x)
    variances = covariance.diagonal()
    lacking = (deviation - (variances + EPS).sqrt()).relu().mean()
    return lacking, (covariance.square().sum() - variances.square().sum()) / x.shape[1]
