"""How the teacher places samples beside each other: losses on relations, over the global batch.

Each rank has the rows of the matrix of pairs that belong to its own samples, and gathers the columns; the gradient of
what was gathered goes home (see :mod:`pipeline.dist.collectives`). So loss and gradient are those of the global batch.
Shape letters: n samples of this rank, N of all, D and E widths of student and teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.dist.collectives import all_gather, gather_with_gradient, mean_over_ranks
from pipeline.nn.distillation.full import in_full, unit

EPS = 1e-7
"""Beside probabilities under a logarithm, as in PKT's published code."""


@in_full
def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss between distances of pairs, each in units of the mean over pairs that do not coincide.

    Park et al., "Relational Knowledge Distillation" (CVPR 2019), distance-wise, as a mean over all N^2 pairs.

    Args:
        student: [n,D].
        teacher: [n,E].

    Returns:
        float[n].
    """
    mine = _relative(_distance(student, gather_with_gradient(student)))
    its = _relative(_distance(teacher.detach(), all_gather(teacher)))
    return functional.smooth_l1_loss(mine, its, reduction="none").mean(dim=1)


def _distance(rows: Tensor, columns: Tensor) -> Tensor:
    # Without a product of matrices, which would cancel; where points coincide, the gradient is nought.
    return torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")


def _relative(distance: Tensor) -> Tensor:
    apart = mean_over_ranks((distance > 0).to(distance).sum()).clamp_min(torch.finfo(distance.dtype).tiny)
    return distance / (mean_over_ranks(distance.sum()) / apart).clamp_min(torch.finfo(distance.dtype).tiny)


@in_full
def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber's loss between the cosines at each sample of the directions to all pairs of others.

    Park et al. (CVPR 2019), angle-wise, as a mean over all N^3 triplets. Each rank holds n N (N + D) numbers.

    Args:
        student: [n,D].
        teacher: [n,E].

    Returns:
        float[n].
    """
    cosines: list[Tensor] = []
    for rows, columns in ((student, gather_with_gradient(student)), (teacher.detach(), all_gather(teacher))):
        direction = unit(columns[None] - rows[:, None])
        cosines.append(direction @ direction.transpose(1, 2))
    mine, its = cosines
    return functional.smooth_l1_loss(mine, its, reduction="none").mean(dim=(1, 2))


@in_full
def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the rows of both Gram matrices, each row of length one: sum / N^2.

    Tung and Mori, "Similarity-Preserving Knowledge Distillation" (ICCV 2019).

    Args:
        student: [n,D].
        teacher: [n,E].

    Returns:
        float[n].
    """
    mine = unit(student @ gather_with_gradient(student).T)
    its = unit(teacher.detach() @ all_gather(teacher).T)
    return (mine - its).square().mean(dim=1)


@in_full
def neighbours(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between the probabilities with which a sample takes each other for its neighbour, by (cosine + 1) / 2.

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer" (ECCV 2018),
    as a mean over all N^2 pairs as in the authors' code.

    Args:
        student: [n,D].
        teacher: [n,E].

    Returns:
        float[n].
    """
    odds: list[Tensor] = []
    for rows, gather in ((student, gather_with_gradient), (teacher.detach(), all_gather)):
        vectors = unit(rows)
        alike = (vectors @ gather(vectors).T + 1) / 2
        odds.append(alike / alike.sum(dim=1, keepdim=True))
    mine, its = odds
    return (its * ((its + EPS) / (mine + EPS)).log()).mean(dim=1)
