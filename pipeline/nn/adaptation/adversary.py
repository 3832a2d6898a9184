"""Gradient reversal, and the network that tells domains apart.

Ganin et al., "Domain-Adversarial Training of Neural Networks" (JMLR 2016), sections 4.2 and 5.2.2.
Shape letters: B samples, D width.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from pipeline.config.strict import Positive, Strict
from pipeline.nn.batch_norm import GlobalBatchNorm
from pipeline.nn.dropout import SampleDropout

STEEPNESS = 10.0
"""The paper's gamma."""


class CriticConfig(Strict):
    """The network that tells domains apart: linear layers with ReLU between them."""

    hidden: tuple[Positive, ...] = (1024, 1024)
    """Widths between features and answer."""
    norm: bool = False
    """Batch norm before each ReLU. It helps the critic, which may then be too good to learn from."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


def critic(width: int, answers: int, config: CriticConfig) -> nn.Sequential:
    """float[B,width] to logits, float[B,answers]."""
    layers: list[nn.Module] = []
    for number, hidden in enumerate(config.hidden):
        layers.append(nn.Linear(width, hidden))
        if config.norm:
            layers.append(GlobalBatchNorm(nn.BatchNorm1d(hidden)))
        layers.append(nn.ReLU())
        if config.dropout:
            layers.append(SampleDropout(config.dropout, f"critic.{number}"))
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, answers))


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * grads[0], None


def reverse_gradient(x: Tensor, factor: float) -> Tensor:
    """``x``; its gradient is that of what follows, times -``factor``."""
    return _Reversal.apply(x, factor)  # pyright: ignore[reportReturnType]


def reversal_at(progress: float, steepness: float = STEEPNESS) -> float:
    """The paper's lambda at a part of the run, 0 to 1: 2 / (1 + exp(-steepness * progress)) - 1."""
    return 2 / (1 + math.exp(-steepness * progress)) - 1
