"""Noise levels drawn more often where the loss is large: Nichol and Dhariwal 2021 (arXiv 2102.09672), section 3.3.

Level t is drawn with a probability proportional to the root mean square of its last losses, and its loss is divided by
that probability, so that the expectation stays as it was and the estimate gets quieter.
Shape letters: B samples, T levels, K losses remembered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

REMEMBERED = 10
"""K. Until every level has been drawn as often, all are as likely."""
UNIFORM = 0.001
"""Part of the draws that are uniform, so that no level is forgotten."""


class Importance(nn.Module):
    """Remembers the levels' losses, in buffers that are the same on every rank.

    Args:
        levels: T.
    """

    history: Tensor
    seen: Tensor

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.register_buffer("history", torch.zeros(levels, REMEMBERED))
        self.register_buffer("seen", torch.zeros(levels, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Of the levels, float64[T]."""
        size = self.history.double().square().mean(dim=1).sqrt()
        even = torch.full_like(size, 1 / len(size))
        drawn = (1 - UNIFORM) * size / size.sum().clamp_min(1e-300) + UNIFORM * even
        known = ((self.seen >= REMEMBERED).all()) & (size.sum() > 0)
        return torch.where(known, drawn, even)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Levels by the inverse of their distribution.

        Args:
            uniform: [B], in [0, 1).

        Returns:
            The middle of each level's share of the quantiles, float64[B], and the factor of its loss, float64[B].
        """
        p = self.probabilities()
        up_to = p.cumsum(0)
        index = torch.searchsorted(up_to, uniform.double() * up_to[-1], right=True).clamp(max=len(p) - 1)
        return (index + 0.5) / len(p), 1 / (len(p) * p[index])

    @torch.no_grad()
    def learn(self, order: Tensor, index: Tensor, loss: Tensor) -> None:
        """Take in the losses of a step, of all ranks together; which rank had which does not matter.

        Args:
            order: int64[B], numbers of the samples: they are taken in by these.
            index: int64[B], levels.
            loss: [B].
        """
        by = order.argsort(stable=True)
        index, loss = index[by], loss[by]
        by = index.argsort(stable=True)
        index, loss = index[by], loss[by]
        count = torch.bincount(index, minlength=len(self.seen))
        nth = torch.arange(len(index), device=index.device) - (count.cumsum(0) - count)[index]
        kept = nth >= count[index] - REMEMBERED  # more would write to one place
        place = (self.seen[index] + nth) % REMEMBERED
        self.history[index[kept], place[kept]] = loss[kept].to(self.history.dtype)
        self.seen += count
