"""Pseudo-labels from centroids of the classes, over a data set that no rank holds as a whole.

Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
Adaptation" (ICML 2020, arXiv 2002.08546), section 3.3, as its code has it. Shape letters: n samples of this rank, D
width, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.core.errors import DataError
from pipeline.dist.collectives import all_reduce

ROUNDS = 2
"""Of centroids: the first weighted by the classifier's answers, the second by the labels that these gave."""


def centroid_labels(features: Tensor, logits: Tensor, least: int = 0) -> Tensor:
    """Label each sample by the centroid with the largest cosine; K x (D+1) numbers travel between ranks, no rows.

    A constant 1 stands behind each feature vector before its length is made 1. A class that is answered for at most
    ``least`` samples has no centroid, so that nothing is labelled so.

    Args:
        features: what the classifier reads of this rank's samples, float[n,D].
        logits: its answers, float[n,K].
        least: see above; 10 where the target may have some of the source's classes only (partial sets).

    Returns:
        int64[n].

    Raises:
        DataError: on every rank, no class is answered often enough.
    """
    rows = functional.normalize(functional.pad(features.double(), (0, 1), value=1.0), dim=1)
    answers, label = logits.double().softmax(dim=1), logits.argmax(dim=1)
    for _ in range(ROUNDS):
        count = all_reduce(torch.bincount(label, minlength=answers.shape[1]))
        there = (count > least).nonzero().squeeze(1)
        if len(there) == 0:
            raise DataError(
                f"no class is answered for more than {least} of {int(count.sum())} samples; lower "
                "objective.least_samples"
            )
        # A centroid's length does not matter to cosines, so sums do as well as means.
        sums = all_reduce(answers.T @ rows)[there]
        label = there[(rows @ functional.normalize(sums, dim=1).T).argmax(dim=1)]
        answers = functional.one_hot(label, answers.shape[1]).double()
    return label
