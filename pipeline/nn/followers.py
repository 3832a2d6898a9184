"""Copies of modules that follow them: momentum teachers and target networks.

What follows is moved by the engine, once after each update (``Objective.averages``), wherever it keeps the parameters.
Buffers are a copy's own: batch norm in training takes the statistics of what the copy itself is shown.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from pipeline.core.protocols import Average
from pipeline.nn.dropout import SampleDropout

M = TypeVar("M", bound=nn.Module)


def follower(module: M) -> M:
    """A copy that gets no gradient and drops nothing."""
    twin = copy.deepcopy(module).requires_grad_(False)
    for layer in twin.modules():
        if isinstance(layer, SampleDropout):
            layer.p = 0.0
    return twin


def following(target: nn.Module, source: nn.Module, keep: float) -> Iterator[Average]:
    """What moves all parameters of a follower towards their source."""
    for mine, theirs in zip(target.parameters(), source.parameters(), strict=True):
        yield Average(mine, theirs, keep)


def cosine_to_one(first: float, progress: float) -> float:
    """What is kept in an update: ``first`` at the beginning of the run, 1 at its end, on half a cosine between.

    1 - (1 - first) * (cos(pi p) + 1) / 2: Grill et al., "Bootstrap your own latent" (2020), section 3.1.
    """
    return 1 - (1 - first) * (math.cos(math.pi * progress) + 1) / 2
