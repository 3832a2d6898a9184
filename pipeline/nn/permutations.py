"""Permutations that are far from each other: the classes of a jigsaw puzzle."""

from __future__ import annotations

from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=8)
def _distant(count: int, tiles: int) -> np.ndarray:
    everyone = np.array(list(permutations(range(tiles))), dtype=np.uint8)
    columns = np.ascontiguousarray(everyone.T)
    chosen, total = [0], np.zeros(len(everyone), dtype=np.int32)
    for _ in range(count - 1):
        last = chosen[-1]
        total[last] = np.iinfo(np.int32).min // 2  # never again
        own = np.zeros(len(everyone), dtype=np.uint8)  # small enough for the processor's cache
        for column, tile in zip(columns, everyone[last], strict=True):
            own += column != tile
        total += own
        chosen.append(int(total.argmax()))
    return everyone[chosen].astype(np.int64)


def distant_permutations(count: int, tiles: int = 9) -> Tensor:
    """Permutations chosen one by one, each as far from those before as any can be.

    Noroozi and Favaro, "Unsupervised Learning of Visual Representations by Solving Jigsaw Puzzles" (ECCV 2016),
    algorithm 1: of all that are left, the one whose mean Hamming distance to those chosen is largest, the first in
    lexicographic order where there are several. The first is the identity.

    Args:
        count: how many, at most tiles!.
        tiles: what is permuted.

    Returns:
        int64[count,tiles], all different.
    """
    return torch.from_numpy(_distant(count, tiles).copy())
