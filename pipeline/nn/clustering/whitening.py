"""Principal components of features that are spread over the ranks, of equal variance.

As Caron et al. prepare features for k-means, "Deep Clustering for Unsupervised Learning of Visual Features" (ECCV
2018), section 4.2. Shape letters: n samples of this rank, N of all, D width, P components.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.dist.collectives import all_reduce, broadcast

ROWS = 8192
"""That are turned to float64 at once."""
FLAT = 1e-6
"""Part of the largest variance below which a direction is rounding, and would be blown up to as much as the rest."""


@torch.no_grad()
def whitened(x: Tensor, width: int) -> Tensor:
    """Unit vectors along the ``width`` directions of most variance, each of which has variance one before.

    Mean and covariance are those of all ranks' samples, in float64; D x D numbers travel, and no rows.

    Args:
        x: float[n,D], this rank's; n may differ between ranks.
        width: P; fewer where there are not so many directions that vary.

    Returns:
        float32[n,P].
    """
    total = torch.cat([x.double().sum(dim=0), x.new_tensor([len(x)], dtype=torch.float64)])
    all_reduce(total)
    mean = total[:-1] / total[-1]
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        centred = rows.double() - mean
        covariance.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(all_reduce(covariance) / total[-1])
    # One rank's for all: libraries on other machines may turn a vector round.
    values, vectors = broadcast(values.flip(0), 0), broadcast(vectors.flip(1), 0)
    kept = int((values[:width] > FLAT * values[0]).sum())
    turn = vectors[:, :kept] / values[:kept].sqrt()
    parts = [functional.normalize((rows.double() - mean) @ turn).float() for rows in x.split(ROWS)]
    return torch.cat(parts) if parts else x.new_zeros(0, kept)
