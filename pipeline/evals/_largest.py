"""The largest values of each row of a matrix, with their columns: what a search for neighbours is beside the product.

Columns are taken in blocks. The k blocks with the largest maxima hold the k largest values: one outside of them is at
most its block's maximum, and so at most k others. Shape letters: Q rows, M columns, S columns of a block, B blocks, k
looked for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 16
"""Columns of which the largest is looked at first."""
FEW = 8
"""A search by blocks pays where there are as many blocks, or columns, for each one that is looked for."""
ROWS = 64
"""That one thread takes at once: what it makes of them stays in its cache."""


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As ``values.topk(k, dim=1)``, and faster where k is a small part of the columns.

    Args:
        values: float[Q,M].
        k: at most M.

    Returns:
        float[Q,k], in falling order, and their columns int64[Q,k]. Of equal ones any.
    """
    columns = values.shape[1]
    if columns < FEW * k or columns < FEW * BLOCK:
        return values.topk(k, dim=1)
    size = BLOCK if columns >= FEW * BLOCK * k else BLOCK // 4
    whole = columns - columns % size
    blocks = values[:, :whole].unflatten(1, (size, -1))
    value, place = (_on_host if values.device.type == "cpu" else _on_device)(blocks, k)
    if whole == columns:
        return value, place
    # The columns that fill no block are few, and all are looked at.
    rest = torch.arange(whole, columns, device=values.device).expand(len(values), -1)
    value, order = torch.cat([value, values[:, whole:]], dim=1).topk(k, dim=1)
    return value, torch.cat([place, rest], dim=1).gather(1, order)


def _on_device(blocks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of float[Q,S,B]: block b holds the columns b, b + B, b + 2 B and so on."""
    size, count = blocks.shape[1:]
    held = largest(blocks.amax(dim=1), k)[1]
    place = (held[:, None] + count * torch.arange(size, device=blocks.device)[:, None]).flatten(1)
    value, order = largest(blocks.flatten(1).gather(1, place), k)
    return value, place.gather(1, order)


def _on_host(blocks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same with NumPy, whose partition takes a fifth of the time of PyTorch's topk. Threads share the rows."""
    parts = [[part.numpy() for part in whole.split(ROWS)] for whole in (blocks, blocks.amax(dim=1))]
    found = list(_threads(torch.get_num_threads()).map(partial(_of_rows, k), *parts))
    values, places = (torch.from_numpy(np.concatenate(each)) for each in zip(*found, strict=True))
    return values, places


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "largest")


def _of_rows(
    k: int, blocks: NDArray[np.floating], maxima: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    """Of some rows, in one thread."""
    rows, size, count = blocks.shape
    if np.isnan(maxima).any():  # they are larger than all, and compare with nothing
        value, place = torch.from_numpy(blocks.reshape(rows, -1)).topk(k, dim=1)
        return value.numpy(), place.numpy()
    least = np.partition(maxima, count - k, axis=1)[:, count - k]
    row, block = np.divmod(np.flatnonzero(maxima >= least[:, None]), count)
    inside = blocks.transpose(0, 2, 1)[row, block]
    held, at = np.divmod(np.flatnonzero(inside >= least[row][:, None]), size)
    # k of each row or more are left, side by side; now each row gets a line of its own.
    row, place, value = row[held], block[held] + count * at, inside[held, at]
    many = np.bincount(row, minlength=rows)
    at = np.arange(len(row)) - (np.cumsum(many) - many)[row]
    values, places = np.full((rows, many.max()), np.inf, value.dtype), np.zeros((rows, many.max()), np.int64)
    values[row, at], places[row, at] = -value, place
    order = np.argsort(values, axis=1)[:, :k]
    return -np.take_along_axis(values, order, 1), np.take_along_axis(places, order, 1)
