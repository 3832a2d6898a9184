"""How far two clusterings of the same samples agree. Shape letter: N samples."""

from __future__ import annotations

import torch
from torch import Tensor


def mutual_information(first: Tensor, second: Tensor) -> float:
    """Normalised mutual information of labels int64[N], by the arithmetic mean of the entropies; from 0 to 1.

    0 where a clustering has one cluster alone. From counts of the pairs that occur, so that N decides what it costs
    and not the number of clusters.
    """
    joint = torch.stack([first, second], dim=1).unique(dim=0, return_counts=True)[1]
    entropies = [_entropy(labels.unique(return_counts=True)[1]) for labels in (first, second)]
    shared = sum(entropies) - _entropy(joint)
    return 2 * shared / sum(entropies) if min(entropies) > 0 else 0.0


def _entropy(counts: Tensor) -> float:
    p = counts.double() / counts.sum()
    return float(-(p * p.log()).sum())
