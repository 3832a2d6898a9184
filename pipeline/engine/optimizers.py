"""Parameter groups and optimizers. Learning rates are set by the loop: ``group["lr"] = lr * group["lr_scale"]``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config.mistakes import Mistakes
from pipeline.config.schema import Group
from pipeline.config.schema import Optimizer as OptimizerConfig
from pipeline.core.protocols import Clock, Objective

NEVER = (0, 0)


class Rule(NamedTuple):
    """What decides a parameter's group."""

    lr_scale: float
    weight_decay: float
    """At the beginning of the run."""
    frozen: tuple[int, int] = NEVER
    """Steps, the second not included, in which the parameter is not trained."""
    weight_decay_end: float | None = None
    """At the end of it; None: the same."""


def layer_index(name: str, layers: Sequence[Sequence[str]]) -> int:
    """Number of the layer whose prefix fits ``name``; what fits none comes after the last, with the heads."""
    for index, prefixes in enumerate(layers):
        if any(name == p or name.startswith(p + ".") for p in prefixes):
            return index
    return len(layers)


def group_of(name: str, groups: Sequence[Group]) -> Group | None:
    """The group of a parameter: that of the longest prefix which holds it."""
    holding = [group for group in groups if _holds(group.prefix, name)]
    return max(holding, key=lambda group: len(_parts(group.prefix)), default=None)


def _parts(prefix: str) -> list[str]:
    return prefix.rstrip(".").split(".")


def _holds(prefix: str, name: str) -> bool:
    parts = _parts(prefix)
    return name.split(".")[: len(parts)] == parts


def freeze(objective: Objective, groups: Sequence[Group], title: str, table: str = "optimizer") -> None:
    """Take the gradient from the parameters of groups that are frozen for the whole run.

    Args:
        objective: its parameters.
        groups: of ``[[optimizer.groups]]``.
        title: what the configuration is called in a message.
        table: where the groups are in it.

    Raises:
        Mistakes: a group that holds no parameter, or none that is trained; or nothing is left to train.
    """
    names = {name: parameter.requires_grad for name, parameter in objective.named_parameters()}
    problems: list[str] = []
    for place, group in enumerate(groups):
        held = [trained for name, trained in names.items() if _holds(group.prefix, name)]
        if not any(held):
            reason = "all that it holds is frozen by the objective" if held else _what_there_is(group.prefix, names)
            problems.append(f"{table}.groups[{place}].prefix: {group.prefix!r}: {reason}")
    for name, parameter in objective.named_parameters():
        group = group_of(name, groups)
        if group is not None and group.frozen:
            parameter.requires_grad_(False)
    if not problems and not any(parameter.requires_grad for parameter in objective.parameters()):
        problems.append(f"{table}.groups: everything is frozen, and nothing is left to train")
    if problems:
        raise Mistakes(title, problems)


def _what_there_is(prefix: str, names: Iterable[str]) -> str:
    """Names that could be meant by a prefix that holds nothing: what lies below the part of it that there is."""
    parts, below = _parts(prefix), [name.split(".") for name in names]
    depth = next(n for n in range(len(parts), -1, -1) if any(name[:n] == parts[:n] for name in below))
    found = dict.fromkeys(".".join(name[: depth + 1]) for name in below if name[:depth] == parts[:depth])
    return f"no parameter has this name or lies below it; there are: {', '.join(found)}"


def rules(
    objective: Objective, config: OptimizerConfig, frozen: Mapping[str, tuple[int, int]] | None = None
) -> dict[str, Rule]:
    """Rule of each trainable parameter, by name.

    No decay for parameters of at most one dimension (norms, biases, temperature) and for those that the objective
    names, unless ``decay`` is "all". With ``layer_decay`` d, layer i of n has d^(n-i) of the learning rate and what
    comes after has all of it (BEiT, arXiv 2106.08254, appendix; the scales of timm's ``param_groups_layer_decay``).

    Args:
        objective: its parameters.
        config: of the optimizer.
        frozen: steps in which a group is not trained, by its prefix (:class:`pipeline.config.resolve.Plan`).
    """
    spared = objective.no_weight_decay()
    layers = objective.layers() if config.layer_decay < 1 else ()
    found: dict[str, Rule] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            group = group_of(name, config.groups) or Group(prefix=name)
            decay = config.weight_decay if group.weight_decay is None else group.weight_decay
            decayed = config.decay == "all" or (parameter.ndim > 1 and name not in spared)
            scale = config.layer_decay ** (len(layers) - layer_index(name, layers)) if layers else 1.0
            if parameter.ndim <= 1:
                scale *= config.lr_vectors
            steps = (frozen or {}).get(group.prefix, NEVER)
            end = config.weight_decay_end if decayed and group.weight_decay is None else None
            found[name] = Rule(scale * group.lr, decay if decayed else 0.0, steps, end)
    return found


def build(
    objective: Objective, config: OptimizerConfig, frozen: Mapping[str, tuple[int, int]] | None = None
) -> torch.optim.Optimizer:
    """The optimizer over the objective's trainable parameters, in groups of equal rules; arguments as :func:`rules`.

    The order of groups and of parameters in them follows the module, so that it is the same in every process.
    """
    groups: dict[Rule, list[Tensor]] = {}
    parameters = dict(objective.named_parameters())
    for name, rule in rules(objective, config, frozen).items():
        groups.setdefault(rule, []).append(parameters[name])
    described: list[dict[str, Any]] = [
        {"params": members, **rule._asdict(), "weight_decay_start": rule.weight_decay}
        for rule, members in groups.items()
    ]
    if config.name == "sgd":
        optimizer = torch.optim.SGD(described, lr=config.lr, momentum=config.momentum)
    elif config.name == "lars":
        optimizer = LARS(described, lr=config.lr, momentum=config.momentum)
    else:
        optimizer = torch.optim.AdamW(described, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    if any(first < end for first, end in (group["frozen"] for group in optimizer.param_groups)):
        _hold_groups(optimizer)
    return optimizer


def _hold_groups(optimizer: torch.optim.Optimizer) -> None:
    """Let groups be held for a while: for :func:`begin_step`.

    Engines count on a gradient of each parameter that they were given, and ZeRO cuts groups to pieces. So gradients of
    held groups are zeros, which no norm sees, and the optimizer finds none, so that it neither moves nor remembers.
    """

    def zero(group: dict[str, Any], gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if group["held"] else None

    def pass_over(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if group["held"]:
                for parameter in group["params"]:
                    parameter.grad = None

    for group in optimizer.param_groups:
        group["held"] = group["frozen"][0] == 0 < group["frozen"][1]
        if group["frozen"][0] < group["frozen"][1]:
            for parameter in group["params"]:
                parameter.register_hook(partial(zero, group))
    optimizer.register_step_pre_hook(pass_over)


def begin_step(optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Before the first forward of a step: hold the groups that are frozen in it, and set what changes along the run."""
    for group in optimizer.param_groups:
        first, end = group["frozen"]
        group["held"] = first <= clock.step < end
        start, last = group["weight_decay_start"], group["weight_decay_end"]
        if last is not None:
            group["weight_decay"] = last + (start - last) * (1 + math.cos(math.pi * clock.progress)) / 2


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
