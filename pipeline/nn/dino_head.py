"""The head of DINO and iBOT: how well a feature vector fits each of many prototypes.

Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (ICCV 2021), appendix C. Shape letters: D
width of the encoder, E of the bottleneck, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Prototypes(nn.Module):
    """Cosines with K directions, each times a length: a linear layer under weight normalisation.

    The directions start as torch draws a linear layer, so their own length is below one, which no forward shows, but
    by which their gradient grows; so does the authors'.

    Args:
        width: E.
        count: K.
        fixed: lengths stay one; else they are trained.
    """

    def __init__(self, width: int, count: int, *, fixed: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(width, count, bias=False).weight.detach().clone())
        self.length = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed)

    def forward(self, units: Tensor) -> Tensor:
        """Unit vectors [...,E] to at least float32[...,K]."""
        with torch.autocast(units.device.type, enabled=False):  # the temperature would enlarge what bf16 rounds
            direction = self.direction if units.dtype == torch.float64 else self.direction.float()
            return functional.linear(units, functional.normalize(direction, dim=1) * self.length.to(direction))


class DINOHead(nn.Module):
    """Three linear layers with GELU between, unit vectors, prototypes ("last").

    Args:
        width: D.
        hidden: width inside.
        bottleneck: E.
        prototypes: K.
        fixed_lengths: of prototypes, see above.
    """

    def __init__(self, width: int, *, hidden: int, bottleneck: int, prototypes: int, fixed_lengths: bool) -> None:
        super().__init__()
        layers = [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.Linear(hidden, bottleneck))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = Prototypes(bottleneck, prototypes, fixed=fixed_lengths)

    def units(self, x: Tensor) -> Tensor:
        """Features [...,D] to unit vectors, at least float32[...,E]: what prototypes are compared with."""
        x = self.layers(x)
        return functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Features [...,D] to logits, at least float32[...,K]."""
        return self.last(self.units(x))
