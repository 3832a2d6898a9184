"""How often each class comes: in the source as its labels say, in the target as the model guesses.

Shares of the target are renewed by surveys of all of it, as Cao et al., "Partial Adversarial Domain Adaptation" (ECCV
2018), and Yan et al., "Mind the Class Weight Bias" (CVPR 2017), estimate them; those of the source are counted while it
is trained on. Shape letters: n samples of this rank, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.dist.collectives import all_reduce, wide


class ClassShares(nn.Module):
    """Shares of K classes in the target, and counts of them in the source so far."""

    target: Tensor
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("target", torch.full((classes,), 1 / classes))
        self.register_buffer("counts", torch.zeros(classes))

    def survey(self, probabilities: Tensor) -> None:
        """Take over the mean answer to all samples: float[n,K], of this rank."""
        answers = wide(probabilities)
        total = torch.cat([answers.sum(0), answers.new_tensor([len(answers)])])
        all_reduce(total)
        self.target.copy_(total[:-1] / total[-1].clamp_min(1))

    def with_batch(self, label: Tensor) -> Tensor:
        """Counts of the source's classes so far, those of this step's labels, int64[n], of all ranks among them."""
        fresh = torch.bincount(label, minlength=len(self.counts)).to(torch.float32)
        return self.counts.float() + all_reduce(fresh)

    def ratios(self, counts: Tensor) -> Tensor:
        """Share in the target over share in the source, float[K]; 0 for classes that the source has not shown."""
        source = counts / counts.sum().clamp_min(1)
        return torch.where(source > 0, self.target.float() / source.clamp_min(1e-12), 0.0)

    def largest_is_one(self) -> Tensor:
        """Shares in the target over the largest one, float[K]: weights that fade classes out which it lacks."""
        return self.target.float() / self.target.float().max().clamp_min(1e-12)
