"""What the losses share: precision, and division by what may be nought."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

from pipeline.dist.collectives import wide

P = ParamSpec("P")


def in_full(loss: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """A loss whose tensors come in at least fp32, and whose products autocast leaves so."""

    @wraps(loss)
    def in_full_precision(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given = [wide(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
        device = next(x.device.type for x in given if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return loss(*given, **kwargs)  # pyright: ignore[reportCallIssue]

    return in_full_precision


def unit(x: Tensor) -> Tensor:
    """Vectors [...,D] of length one, and nought where there is no direction, which then has no gradient."""
    length = x.norm(dim=-1, keepdim=True)
    there = length > 0
    return torch.where(there, x / torch.where(there, length, 1), 0)
