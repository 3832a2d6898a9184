"""The tiled losses against open_clip's own, value and gradients."""

import pytest
import torch
from torch.nn import functional

from pipeline.nn.contrastive import info_nce, sigmoid_loss

pytest.importorskip("open_clip", reason="needs the extra 'parity'")


@pytest.mark.filterwarnings("ignore")  # open_clip's imports
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_value_and_gradients_are_open_clips(kind, scale):
    from open_clip.loss import ClipLoss, SigLipLoss

    draw = torch.randn(2, 33, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for ours in (True, False):
        image, text = (functional.normalize(x, dim=1).requires_grad_() for x in draw)
        s = torch.tensor([scale], dtype=torch.float64, requires_grad=True)
        b = torch.tensor([-10.0], dtype=torch.float64, requires_grad=True)
        if kind == "softmax":
            loss = info_nce(image, text, s, tile=8) if ours else ClipLoss()(image, text, s)
            leaves = [image, text, s]
        else:
            loss = sigmoid_loss(image, text, s, b, tile=8) if ours else SigLipLoss()(image, text, s, b)
            leaves = [image, text, s, b]
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for own, theirs in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)
