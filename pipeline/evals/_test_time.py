"""Adapting a classifier to a stream without labels: statistics of batch norm anew, and entropy minimisation.

Shape letters: B samples of a batch, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core.errors import ConfigError
from pipeline.core.protocols import Batch, Objective, StepContext, StepOutput
from pipeline.dist.collectives import all_reduce
from pipeline.nn.adaptation.information import entropy
from pipeline.nn.batch_norm import synchronise


def norms_of(classifier: nn.Module) -> list[_BatchNorm]:
    """The batch norms with statistics of their own.

    Raises:
        ConfigError: there are none.
    """
    found = [m for m in classifier.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not found:
        raise ConfigError(
            "the model has no batch norm, whose statistics or scales are what is adapted at test time; measure a model "
            "that has (a ResNet), or adapt this one by training: adapt_shot, adapt_neighbours"
        )
    return found


@torch.no_grad()
def recalibrated(classifier: nn.Module, batches: Iterable[Batch], device: torch.device) -> nn.Module:
    """A copy whose batch norms hold the statistics of a stream, each measured behind layers that normalise by batch.

    The mean and the variance are those of all samples together: what batches of all ranks have found is added up, the
    spread of their means included. All ranks call this together.

    Args:
        classifier: in eval mode.
        batches: this rank's.
        device: to compute on.
    """
    model = copy.deepcopy(classifier).eval()
    norms = norms_of(model)
    sums = {id(norm): torch.zeros(2 * norm.num_features + 1, dtype=torch.float64, device=device) for norm in norms}

    def measure(norm: Any, given: tuple[Tensor, ...]) -> None:
        """Put the statistics of a batch in place of the running ones, before the norm itself reads them."""
        x = given[0].double()
        axes = [d for d in range(x.ndim) if d != 1]
        count = x.numel() // x.shape[1]
        mean, square = x.mean(axes), x.square().mean(axes)
        sums[id(norm)] += torch.cat([mean * count, square * count, mean.new_tensor([count])])
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(x.var(axes, unbiased=False))

    hooks = [norm.register_forward_pre_hook(measure) for norm in norms]
    for batch in batches:
        model(batch["image"].to(device))
    for hook in hooks:
        hook.remove()
    for norm in norms:
        total = all_reduce(sums[id(norm)])
        mean, square = (total[:-1] / total[-1]).chunk(2)
        assert norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(mean)
        norm.running_var.copy_((square - mean.square()).clamp_min(0) * total[-1] / (total[-1] - 1).clamp_min(1))
    return model


class Tent(Objective):
    """A classifier whose batch norms' scales and shifts learn to make its answers sure; nothing else is trained.

    Args:
        classifier: it is copied, and its batch norms then take the statistics of the batch of all ranks.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.needs = {"image": "uint8[B,C,H,W]"}
        self.model = synchronise(copy.deepcopy(classifier)).requires_grad_(False)
        affine = [p for norm in norms_of(self.model) for p in (norm.weight, norm.bias) if p is not None]
        if not affine:
            raise ConfigError("the model's batch norms have neither scale nor shift, which is all that TENT trains")
        for parameter in affine:
            parameter.requires_grad_(True)

    def forward(self, batch: Batch, ctx: StepContext) -> StepOutput:
        """Mean entropy of the answers."""
        losses = entropy(self.model(batch["image"]).float())
        return StepOutput(losses.mean(), {}, losses.detach())

    def train(self, mode: bool = True) -> Tent:
        """Only batch norms: no dropout, no drop path."""
        super().train(mode)
        for module in self.model.modules():
            if not isinstance(module, _BatchNorm):
                module.training = False
        return self

    def encoders(self) -> Mapping[str, nn.Module]:
        """The classifier."""
        return {"logits": self.model}
