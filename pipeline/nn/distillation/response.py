"""What the teacher answers: losses on logits.

Shape letters: B samples, K classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.dist.collectives import global_mean
from pipeline.nn.distillation.full import in_full

CONSTANT = 1e-6
"""Spread of probabilities, as a part of their mean, that is taken for rounding."""


@in_full
def labels(student: Tensor, label: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the data's labels.

    Args:
        student: logits [B,K].
        label: int64[B]; or float[B,K], the parts of the classes where samples are mixed.
        smoothing: part of the target that is spread over all classes.
    """
    return functional.cross_entropy(student, label, label_smoothing=smoothing, reduction="none")


@in_full
def hard(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with what the teacher decides.

    Touvron et al., "Training data-efficient image transformers & distillation through attention" (ICML 2021), eq. 3.

    Args:
        student: logits [B,K].
        teacher: logits [B,K].
    """
    return functional.cross_entropy(student, teacher.argmax(dim=1), reduction="none")


@in_full
def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(p_T(teacher) || p_T(student)), summed over classes.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015, arXiv 1503.02531), section 2: T^2 keeps the
    gradient's size where T changes.

    Args:
        student: logits [B,K].
        teacher: logits [B,K].
        temperature: T.
    """
    return temperature**2 * _divergence(student / temperature, teacher.detach() / temperature)


@in_full
def decoupled(student: Tensor, teacher: Tensor, label: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    """T^2 (alpha KL of target against the rest + beta KL among the rest).

    Zhao et al., "Decoupled Knowledge Distillation" (CVPR 2022). The rest is a softmax of its own, over K - 1
    logits, and its mass a log-sum-exp: no logarithm of a small sum.

    Args:
        student: logits [B,K].
        teacher: logits [B,K].
        label: int64[B].
        alpha: weight of the target class.
        beta: weight of the other classes.
        temperature: T.
    """
    place = torch.arange(student.shape[1] - 1, device=student.device)
    others = place + (place >= label[:, None])  # [B,K-1]

    def parted(logits: Tensor) -> tuple[Tensor, Tensor]:
        rest = logits.gather(1, others)
        return torch.stack([logits.gather(1, label[:, None])[:, 0], rest.logsumexp(dim=1)], dim=1), rest

    (mine, mine_rest), (its, its_rest) = (parted(x / temperature) for x in (student, teacher.detach()))
    return temperature**2 * (alpha * _divergence(mine, its) + beta * _divergence(mine_rest, its_rest))


@in_full
def correlation(student: Tensor, teacher: Tensor, beta: float, gamma: float, temperature: float) -> Tensor:
    """T^2 (beta (1 - r between classes) + gamma (1 - r within classes)), r Pearson's correlation of probabilities.

    Huang et al., "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022): between the classes of a
    sample, and for each class between the samples of the global batch; T^2 as in the authors' code.

    Args:
        student: logits [B,K] of this rank.
        teacher: logits [B,K].
        beta: weight of the relation between classes.
        gamma: weight of the relation within classes.
        temperature: T.
    """
    mine, its = ((x / temperature).softmax(dim=1) for x in (student, teacher.detach()))
    rows = [_standard(x, x.mean(1, keepdim=True), lambda y: y.mean(1, keepdim=True)) for x in (mine, its)]
    # Over the global batch by sums alone; each sample adds its product, so that 1 - r is a mean over samples.
    columns = [_standard(x, global_mean(x), global_mean) for x in (mine, its)]
    between, within = (1 - (a * b).mean(dim=1) for a, b in (rows, columns))
    return temperature**2 * (beta * between + gamma * within)


def _standard(x: Tensor, mean: Tensor, average: Callable[[Tensor], Tensor]) -> Tensor:
    """Of mean nought and variance one; nought, without gradient, where ``x`` varies by rounding alone."""
    centred = x - mean
    variance = average(centred.square())
    varies = variance > (CONSTANT * mean).square()
    return torch.where(varies, centred * torch.where(varies, variance, 1).rsqrt(), 0)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) || softmax(student)), summed over the last dimension."""
    mine, its = student.log_softmax(dim=-1), teacher.log_softmax(dim=-1)
    return (its.exp() * (its - mine)).sum(dim=-1)
