"""Weighted nearest neighbours in feature space, on frozen features.

The protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018), as
DINO runs it: cosine similarity s, votes exp(s / T) with T = 0.07, over the k nearest of the bank.
Shape letters: Q queries, M bank samples, K classes, D width, k neighbours.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Evaluation, Output, Uses
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._classes import in_classes_of
from pipeline.evals._classified import GUESSES, accuracies, by_class, guesses
from pipeline.evals._largest import largest

QUERIES = 1024
"""Queries compared at once. The result must not depend on the number of ranks, so neither may this."""
BANK = 65536
"""Bank samples compared at once."""


class Config(Strict):
    """Settings of the nearest-neighbour evaluation."""

    train: str = "train"
    """Stream that makes up the bank."""
    test: str = "val"
    """Stream that is classified."""
    k: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (10, 20, 100, 200)
    """Numbers of neighbours; each is reported."""
    temperature: Annotated[float, Field(gt=0)] = 0.07


class KNN(Evaluation):
    """Reports "knn/top1_k20" and, with at least five classes, "knn/top5_k20", for each k; and for the first k
    "knn/mean_per_class_recall_k20" and, with at most fifty classes, the table "knn/confusion_k20".

    A class that got no vote is never among the best five.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Bank and queries."""
        return Uses({name: ("image", "label") for name in (self.config.train, self.config.test)})

    def scores(self, classes: int) -> Mapping[str, tuple[float, float]]:
        """Of top-1; the chance of top-5 depends on how many classes get a vote."""
        return {f"knn/top1_k{k}": (1 / classes, 1.0) for k in self.config.k}

    def check(self, ctx: EvalContext) -> None:
        """No more neighbours than there are."""
        samples = ctx.streams[self.config.train].samples
        if max(self.config.k) > samples:
            raise ConfigError(
                f"knn.k: {max(self.config.k)} neighbours asked for, but stream {self.config.train!r} has only "
                f"{samples} samples"
            )

    def run(self, ctx: EvalContext) -> Iterator[Output]:
        """Extract, classify and count; each rank classifies its part of the queries.

        Raises:
            DataError: a query is of a class that the bank does not know.
        """
        device = ctx.place.device
        bank, test = (ctx.features("image", name) for name in (self.config.train, self.config.test))
        test = in_classes_of(test, bank.classes, self.config.test, f"stream {self.config.train!r}", bank.label)
        classes, keys = len(bank.classes), functional.normalize(bank.x)
        # Guesses of all ranks are added up: each is zero in all but one.
        found = torch.zeros(len(self.config.k), len(test.x), min(GUESSES, classes), dtype=torch.int64)
        space = space_for(test.x[:QUERIES].to(device), keys)
        for first in list(range(0, len(test.x), QUERIES))[ctx.place.rank :: ctx.place.world_size]:
            query = functional.normalize(test.x[first : first + QUERIES]).to(device)
            similarity, neighbour = nearest(query, keys, max(self.config.k), space)
            guess = self.guessed(similarity, bank.label.to(device)[neighbour], classes)
            for i, k in enumerate(self.config.k):
                found[i, first : first + QUERIES] = guess[k].cpu()
        found = sum_over_ranks(found)
        for guess, k in zip(found, self.config.k, strict=True):
            yield from accuracies("knn", guess, test.label, classes, self.config.test, f"_k{k}")
        yield from by_class("knn", found[0], test.label, bank.classes, self.config.test, f"_k{self.config.k[0]}")

    def guessed(self, similarity: Tensor, label: Tensor, classes: int) -> dict[int, Tensor]:
        """For each k, the :func:`guesses` of votes exp(s / T) of the k nearest; classes without a vote are not guessed.

        Votes of a query are scaled by its nearest neighbour's, so that none overflows.

        Args:
            similarity: float[Q,k] of the largest k, nearest first.
            label: int64[Q,k].
            classes: K.
        """
        weight = ((similarity - similarity[:, :1]) / self.config.temperature).exp()
        votes = weight.new_full((len(weight), classes), -math.inf)
        found, first = dict[int, Tensor](), 0
        for k in sorted(set(self.config.k)):  # each goes on from the one before
            new = label[:, first:k]
            there = votes.gather(1, new)
            votes.scatter_(1, new, there.masked_fill_(there == -math.inf, 0))
            votes.scatter_add_(1, new, weight[:, first:k])
            found[k], first = guesses(votes), k
        return found


def nearest(query: Tensor, bank: Tensor, k: int, space: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k most similar bank samples of each query, nearest first, with bounded memory.

    Args:
        query: unit vectors, float32[Q,D], on the device that computes.
        bank: unit vectors, float32[M,D], anywhere.
        k: neighbours, at most M.
        space: from :func:`space_for`, written over; memory that is new every time takes as long as half the product.

    Returns:
        Cosine similarities float32[Q,k] and numbers in the bank int64[Q,k].
    """
    space = space_for(query, bank) if space is None else space
    similarity, index = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64).to(query.device)
    for first in range(0, len(bank), BANK):
        keys = bank[first : first + BANK].to(query.device)
        part = space[: len(query), : len(keys)]
        torch.mm(query, keys.T, out=part)
        best, where = largest(part, min(k, len(keys)))
        similarity, index = torch.cat([similarity, best], dim=1), torch.cat([index, where + first], dim=1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, order)
    return similarity, index


def space_for(query: Tensor, bank: Tensor) -> Tensor:
    """Memory for the similarities of as many queries to a part of the bank, on the device of the queries."""
    return query.new_empty(len(query), min(BANK, len(bank)))
