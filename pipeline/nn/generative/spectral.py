"""Spectral normalisation: weights divided by their largest singular value.

Miyato et al., "Spectral Normalization for Generative Adversarial Networks" (ICLR 2018, arXiv 1802.05957), algorithm 1.
torch's own (``torch.nn.utils.parametrizations.spectral_norm``) moves its singular vectors in every forward in training,
so that a step would depend on how many micro-batches and phases it is made of. Here a forward changes nothing:
:func:`follow` moves the vectors once a step, the same on every rank.
Shape letters: O outputs, I all other dimensions of a weight together.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from pipeline.dist.collectives import wide
from pipeline.nn.convolution import Conv

M = TypeVar("M", bound=nn.Module)
START, PER_STEP = 15, 5
"""Power iterations at first (as many as torch's), and in each step: a critic may be updated several times in one."""


class SpectralNorm(nn.Module):
    """What ``parametrize`` puts between a weight and its layer.

    Args:
        weight: [O,...].
    """

    u: Tensor
    """float32[O], the left singular vector."""
    v: Tensor
    """float32[I], the right one."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        flat = weight.detach().flatten(1)
        self.register_buffer("u", functional.normalize(torch.randn(flat.shape[0]), dim=0))
        self.register_buffer("v", functional.normalize(torch.randn(flat.shape[1]), dim=0))
        self.iterate(weight, START)

    @torch.no_grad()
    def iterate(self, weight: Tensor, times: int) -> None:
        """Move the vectors towards those of ``weight``."""
        flat = weight.detach().flatten(1).to(self.u.dtype)
        for _ in range(times):
            self.u.copy_(functional.normalize(flat @ self.v, dim=0))
            self.v.copy_(functional.normalize(flat.T @ self.u, dim=0))

    def forward(self, weight: Tensor) -> Tensor:
        """[O,...] to the same shape; u and v are constants, so that the gradient is that of eq. 11."""
        with torch.autocast(weight.device.type, enabled=False):
            flat = wide(weight.flatten(1))
            largest = self.u.to(flat.dtype) @ (flat @ self.v.to(flat.dtype))
            return (weight / largest).to(weight.dtype)


def spectrally_normed(module: M) -> M:
    """Divide the weights of all layers inside ``module``, in place."""
    for layer in list(module.modules()):
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding | Conv):
            parametrize.register_parametrization(layer, "weight", SpectralNorm(layer.weight), unsafe=True)
    return module


@torch.no_grad()
def follow(module: nn.Module) -> None:
    """Move the singular vectors of all weights inside ``module`` after an update."""
    for layer in module.modules():
        if isinstance(layer, parametrize.ParametrizationList):
            for norm in layer:
                if isinstance(norm, SpectralNorm):
                    norm.iterate(layer.original, PER_STEP)
