"""The losses over all pairs on an accelerator, with compiled kernels and without, against the processor in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.nn import contrastive, tile_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
]
LOSSES: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda a, b, s, t: contrastive.info_nce(a, b, s, tile=t),
    "sigmoid": lambda a, b, s, t: contrastive.sigmoid_loss(a, b, s, s.detach() - 24, tile=t),
    "views": lambda a, b, s, t: contrastive.nt_xent(a, b, s, tile=t),
}


def gradients(name: str, device: str, dtype: torch.dtype, tile: int | None) -> list[Tensor]:
    draw = torch.randn(2, 700, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draw[1] += draw[0] / 4
    leaves = [functional.normalize(x, dim=1).to(device, dtype).requires_grad_() for x in draw]
    leaves.append(torch.tensor([14.3], device=device, dtype=dtype, requires_grad=True))
    loss = LOSSES[name](*leaves, tile)
    return [g.double().cpu() for g in (loss.detach(), *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("fuse_from", [0, 2**63], ids=["compiled", "plain"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients(name, fuse_from, monkeypatch):
    monkeypatch.setattr(tile_kernels, "FUSE_FROM", fuse_from)
    exact = gradients(name, "cpu", torch.float64, None)
    for tile in (None, 256):
        for got, want in zip(gradients(name, "cuda", torch.float32, tile), exact, strict=True):
            assert float((got - want).norm() / want.norm()) < 1e-5
