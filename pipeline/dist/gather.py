"""Gathering rows of which every rank has a different number, for evaluation."""

import torch
from torch import Tensor

from pipeline.dist.collectives import gather_into
from pipeline.dist.group import gather_rows

CHUNK_BYTES = 64 * 2**20
"""Most that one rank sends in one collective."""


def gather_ragged(rows: Tensor) -> Tensor:
    """All ranks' rows, those of rank 0 first, on every rank.

    Args:
        rows: [n,...], with n of this rank; the other dimensions and the type are the same on all ranks.

    Returns:
        [sum of n,...].
    """
    counts = gather_rows(torch.tensor([len(rows)], device=rows.device)).flatten().tolist()
    shape = rows.shape[1:]
    step = max(1, CHUNK_BYTES // max(1, shape.numel() * rows.element_size()))
    out = rows.new_empty(sum(counts), *shape)
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    for first in range(0, max(counts), step):
        size = min(step, max(counts) - first)
        mine = rows[first : first + size]
        padded = torch.cat([mine, mine.new_zeros(size - len(mine), *shape)])
        parts = padded.new_empty(len(counts) * size, *shape)
        gather_into(parts, padded)
        for rank, part in enumerate(parts.view(len(counts), size, *shape)):
            valid = max(0, min(size, counts[rank] - first))
            out[starts[rank] + first : starts[rank] + first + valid] = part[:valid]
    return out
