"""Weighted nearest neighbours in feature space, on frozen features.

The protocol of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (CVPR 2018), as
DINO runs it: cosine similarity s, votes exp(s / T) with T = 0.07, over the k nearest of the bank.
Shape letters: Q queries, M bank samples, K classes, D width, k neighbours.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Annotated

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from pipeline.config.schema import Strict
from pipeline.core.errors import ConfigError
from pipeline.core.protocols import EvalStream, Evaluation, Result
from pipeline.dist.group import sum_over_ranks
from pipeline.evals._features import extract, named_stream

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
    """Reports "knn/top1_k20" and, with at least five classes, "knn/top5_k20", for each k."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, encoders: Mapping[str, nn.Module], streams: Mapping[str, EvalStream]) -> Iterator[Result]:
        """Extract, classify and count; each rank classifies its part of the queries.

        Raises:
            ConfigError: a k larger than the bank, or an unknown stream.
        """
        bank_stream = named_stream(streams, self.config.train, "knn.train")
        test_stream = named_stream(streams, self.config.test, "knn.test")
        if max(self.config.k) > bank_stream.samples:
            raise ConfigError(
                f"knn.k: {max(self.config.k)} neighbours asked for, but stream {self.config.train!r} has only "
                f"{bank_stream.samples} samples"
            )
        device = next(encoders["image"].parameters()).device
        bank, test = extract(encoders["image"], bank_stream), extract(encoders["image"], test_stream)
        keys = functional.normalize(bank.x)
        hits = torch.zeros(2, len(self.config.k), dtype=torch.int64)
        for first in list(range(0, len(test.x), QUERIES))[dist.get_rank() :: dist.get_world_size()]:
            query = functional.normalize(test.x[first : first + QUERIES]).to(device)
            similarity, neighbour = nearest(query, keys, max(self.config.k))
            label = bank.label.to(device)[neighbour]
            truth = test.label[first : first + QUERIES, None].to(device)
            for i, k in enumerate(self.config.k):
                votes = self.votes(similarity[:, :k], label[:, :k], bank.classes)
                best = votes.topk(min(5, bank.classes), dim=1).indices == truth
                hits[0, i] += int(best[:, 0].sum())
                hits[1, i] += int(best.sum())
        hits = sum_over_ranks(hits)
        n = test_stream.samples
        for i, k in enumerate(self.config.k):
            for row, name in enumerate(("top1", "top5") if bank.classes >= 5 else ("top1",)):
                p = int(hits[row, i]) / n
                yield Result(f"knn/{name}_k{k}", p, n, self.config.test, math.sqrt(p * (1 - p) / n))

    def votes(self, similarity: Tensor, label: Tensor, classes: int) -> Tensor:
        """[Q,k] similarities and labels to [Q,K] sums of exp(s / T), each query's scaled by its nearest neighbour's."""
        weight = ((similarity - similarity[:, :1]) / self.config.temperature).exp()
        return weight.new_zeros(len(weight), classes).scatter_add_(1, label, weight)


def nearest(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar bank samples of each query, nearest first, with bounded memory.

    Args:
        query: unit vectors, float32[Q,D], on the device that computes.
        bank: unit vectors, float32[M,D], anywhere.
        k: neighbours, at most M.

    Returns:
        Cosine similarities float32[Q,k] and numbers in the bank int64[Q,k].
    """
    similarity, index = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64).to(query.device)
    for first in range(0, len(bank), BANK):
        part = query @ bank[first : first + BANK].to(query.device).T
        best, where = part.topk(min(k, part.shape[1]), dim=1)
        similarity, index = torch.cat([similarity, best], dim=1), torch.cat([index, where + first], dim=1)
        similarity, order = similarity.topk(min(k, similarity.shape[1]), dim=1)
        index = index.gather(1, order)
    return similarity, index
