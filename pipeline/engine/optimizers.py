"""Parameter groups and optimizers. Learning rates are set by the loop: ``group["lr"] = lr * group["lr_scale"]``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.protocols import Objective


class Rule(NamedTuple):
    """What decides a parameter's group."""

    lr_scale: float
    weight_decay: float


def layer_index(name: str, layers: Sequence[Sequence[str]]) -> int:
    """Number of the layer whose prefix fits ``name``; what fits none comes after the last, with the heads."""
    for index, prefixes in enumerate(layers):
        if any(name == p or name.startswith(p + ".") for p in prefixes):
            return index
    return len(layers)


def rules(objective: Objective, config: OptimizerConfig) -> dict[str, Rule]:
    """Rule of each trainable parameter, by name.

    No decay for parameters of at most one dimension (norms, biases, temperature) and for those that the objective
    names. With ``layer_decay`` d, layer i of n has d^(n-i) of the learning rate and what comes after has all of it
    (BEiT, arXiv 2106.08254, appendix; the scales of timm's ``param_groups_layer_decay``).
    """
    spared = objective.no_weight_decay()
    layers = objective.layers() if config.layer_decay < 1 else ()
    found: dict[str, Rule] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name not in spared
            scale = config.layer_decay ** (len(layers) - layer_index(name, layers)) if layers else 1.0
            found[name] = Rule(scale, config.weight_decay if decayed else 0.0)
    return found


def build(objective: Objective, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer over the objective's trainable parameters, in groups of equal rules.

    The order of groups and of parameters in them follows the module, so that it is the same in every process.
    """
    groups: dict[Rule, list[Tensor]] = {}
    parameters = dict(objective.named_parameters())
    for name, rule in rules(objective, config).items():
        groups.setdefault(rule, []).append(parameters[name])
    described: list[dict[str, Any]] = [
        {"params": members, "lr_scale": rule.lr_scale, "weight_decay": rule.weight_decay}
        for rule, members in groups.items()
    ]
    if config.name == "sgd":
        return torch.optim.SGD(described, lr=config.lr, momentum=config.momentum)
    if config.name == "lars":
        return LARS(described, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rates: You et al., "Large Batch Training of Convolutional Networks" (2017, arXiv 1708.03888).

    g <- g + decay * w; for tensors of more than one dimension g <- g * 0.001 |w| / |g|; m <- momentum * m + g;
    w <- w - lr * m. As in SimCLR and MoCo v3, norms and biases (one dimension) are not adapted, by their shape and not
    by their decay: with a decay of zero, as in linear probes, matrices are adapted all the same.
    """

    TRUST = 0.001

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.add(p, alpha=group["weight_decay"])
                if p.ndim > 1:
                    size, slope = p.norm(), g.norm()
                    # A layer that is zero, or has no gradient, is left to plain gradient descent.
                    g.mul_(torch.where((size > 0) & (slope > 0), self.TRUST * size / slope, 1.0))
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                state["momentum_buffer"].mul_(group["momentum"]).add_(g)
                p.sub_(group["lr"] * state["momentum_buffer"])


def clip(parameters: Iterable[Tensor], limit: float | None) -> Tensor:
    """Scale gradients so that their norm over all is at most ``limit``; returns the norm before, a scalar."""
    parameters = list(parameters)
    if limit is not None:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])  # and leaves them alone


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its part of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
