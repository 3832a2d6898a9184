"""k-means of vectors that are spread over the ranks: rows stay where they are, and only centres and their sums travel.

Lloyd, "Least squares quantization in PCM" (1982). It begins with samples drawn at chance and splits large clusters
where others have become empty, as faiss does, which DeepCluster used. Shape letters: n samples of this rank, N of all,
K clusters, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.dist.collectives import all_reduce
from pipeline.dist.gather import gather_ragged

SCORES = 2**21
"""Products of samples and centres that are held at once: they stay in a processor's cache."""
SPLIT = 1 / 1024
"""By which the halves of a cluster are moved apart, relative to its centre."""


class Clusters(NamedTuple):
    """What was found."""

    centres: Tensor
    """float32[K,D], the same on every rank."""
    label: Tensor
    """int64[n], the nearest centre of each of this rank's samples."""
    sizes: Tensor
    """int64[K], samples of each cluster on all ranks."""
    inertia: float
    """Mean over all samples of the squared distance from the nearest centre."""


@torch.no_grad()
def kmeans(x: Tensor, clusters: int, draws: Tensor, iterations: int = 20) -> Clusters:
    """Cluster all ranks' rows. The same at any number of ranks, up to the order in which sums are taken.

    Args:
        x: float32[n,D], this rank's; n may differ between ranks.
        clusters: K, at most N.
        draws: float[n], a random number of each sample: those with the K smallest are the first centres.
        iterations: at most; fewer where no sample changes its cluster any more.
    """
    centres = _first(x, clusters, draws)
    label = torch.full((len(x),), -1, device=x.device)
    for _ in range(iterations):
        sums, found = _sums(x, centres)
        changed = all_reduce((found != label).sum())
        label, sizes = found, sums[:, -1]
        if not changed and (sizes > 0).all():
            break
        centres = (sums[:, :-1] / sizes.clamp_min(1)[:, None]).float()
        _split(centres, sizes)
    return _assigned(x, centres)


def _first(x: Tensor, clusters: int, draws: Tensor) -> Tensor:
    """The rows with the smallest draws, in their order: float32[K,D]."""
    smallest = draws.double().sort().values[:clusters]
    known = gather_ragged(smallest).sort().values
    assert len(known) >= clusters, "fewer samples than clusters"
    mine = draws.double() <= known[clusters - 1]
    rows, order = gather_ragged(x[mine].contiguous()), gather_ragged(draws[mine].double())
    return rows[order.argsort(stable=True)[:clusters]].clone()


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Of the nearest centre x c - |c|^2 / 2, which is the largest, float32[n]; and which it is, int64[n]."""
    # On a CPU `argmax` takes three times as long as the maximum together with its place.
    return torch.addmm(-0.5 * centres.square().sum(dim=1), x, centres.T).max(dim=1)


def _parts(x: Tensor, centres: Tensor) -> tuple[Tensor, ...]:
    """Rows whose products with all centres are held at once; at least one part, which may be empty."""
    return x.split(max(64, SCORES // len(centres)))


def _sums(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and number of the rows nearest to each centre, of all ranks, float64[K,D+1]; and this rank's labels."""
    count, width = centres.shape
    sums = torch.zeros(count, width + 1, dtype=torch.float64, device=x.device)
    labels: list[Tensor] = []
    for rows in _parts(x, centres):
        label = _nearest(rows, centres)[1]
        sizes = torch.bincount(label, minlength=count)
        # Sums over rows that are sorted by their cluster: quick, and without atomics, so the same in every run.
        starts = sizes.cumsum(0) - sizes
        sums[:, :-1] += functional.embedding_bag(label.argsort(stable=True), rows, starts, mode="sum")
        sums[:, -1] += sizes
        labels.append(label)
    return all_reduce(sums), torch.cat(labels)


def _split(centres: Tensor, sizes: Tensor) -> None:
    """Give each empty cluster half of the one that is largest, in place."""
    for empty in (sizes == 0).nonzero().flatten().tolist():
        largest = int(sizes.argmax())
        shift = torch.full_like(centres[0], SPLIT)
        shift[1::2] = -SPLIT
        centres[empty] = centres[largest] * (1 + shift)
        centres[largest] *= 1 - shift
        sizes[empty] = sizes[largest] / 2
        sizes[largest] -= sizes[empty]


def _assigned(x: Tensor, centres: Tensor) -> Clusters:
    """Every row to its nearest centre."""
    found = [(rows.square().sum(dtype=torch.float64), *_nearest(rows, centres)) for rows in _parts(x, centres)]
    label = torch.cat([own for *_, own in found])
    error = torch.stack([squares - 2 * largest.sum(dtype=torch.float64) for squares, largest, _ in found]).sum()
    total = all_reduce(torch.stack([error, error.new_tensor(len(x))]))
    sizes = all_reduce(torch.bincount(label, minlength=len(centres)))
    return Clusters(centres, label, sizes, float(total[0] / total[1]))
