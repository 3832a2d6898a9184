"""Balanced soft assignments of the samples of the global batch to prototypes.

Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (NIPS 2013), as SwAV uses it (Caron et al.,
NeurIPS 2020, section 3.1 and its ``distributed_sinkhorn``). Shape letters: n samples of this rank, K prototypes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.dist.collectives import all_reduce

LEAST = 0.005
"""Epsilon below which exp(-2 / epsilon), of cosines, leaves the range of float64."""


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, weights: Tensor | None = None) -> Tensor:
    """Assignments under which all prototypes get as many samples, as far as ``iterations`` bring it.

    The matrix exp(scores / epsilon) is scaled, in turn, so that columns (prototypes) and rows (samples) of the global
    batch have equal sums; rows come last. Scalings are vectors, so that an iteration is two products with one matrix,
    and K numbers travel. In float64: exact at any number of ranks, and for any epsilon from :data:`LEAST` on.

    Args:
        scores: float[n,K], cosines of this rank's samples; n may differ between ranks.
        epsilon: of the entropy; the smaller, the harder the assignments.
        iterations: of both scalings.
        weights: float[n], what a sample counts for, 0 for one that does not; None: all count alike.

    Returns:
        float32[n,K], rows that sum to one.
    """
    logits = scores.double() / epsilon
    peaks = logits.amax(dim=1)
    top = all_reduce(peaks.amax(), dist.ReduceOp.MAX)
    kernel = (logits - peaks[:, None]).exp()
    counted = torch.ones_like(peaks) if weights is None else weights.double()
    rows = (peaks - top).exp()
    columns = torch.ones_like(kernel[0])
    for _ in range(iterations):
        mass = all_reduce(kernel.T @ (rows * counted)).clamp_min(torch.finfo(torch.float64).tiny)
        columns = mass.min() / mass  # at most one: a common factor changes nothing, and would grow without end
        rows = 1 / (kernel @ columns)
    return (rows[:, None] * kernel * columns).float()
