"""Which teacher's feature belongs to which sample: contrast over the global batch, or against a queue.

Shape letters: n samples of this rank, D width of the common space, E the teacher's, Q features in the queue.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.nn.contrastive import info_nce
from pipeline.nn.distillation.full import in_full, unit
from pipeline.nn.distillation.response import soft_targets


@in_full
def contrast(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """A sample's feature finds the teacher's of the same sample among those of the global batch, and the other way.

    As Tian et al., "Contrastive Representation Distillation" (ICLR 2020), with linear layers on both
    sides; the negatives are the other samples of the global batch, under InfoNCE in place of their memory bank under
    NCE. The teacher's layer is trained, so that here ``teacher`` gets a gradient.

    Args:
        student: [n,D].
        teacher: [n,D].
        temperature: T.

    Returns:
        float[n].
    """
    mine, its = unit(student), unit(teacher)
    return info_nce(mine, its, mine.new_full((1,), 1 / temperature), reduction="none")


@in_full
def against_queue(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher queue^T / T) || softmax(student queue^T / T)): the same neighbours among earlier samples.

    Fang et al., "SEED: Self-supervised Distillation for Visual Representation" (ICLR 2021), less a constant; the
    teacher's feature of the sample itself is one more in the queue.

    Args:
        student: in the teacher's space, [n,E].
        teacher: [n,E].
        queue: the teacher's unit vectors of earlier samples, [Q,E].
        temperature: T, of both.

    Returns:
        float[n].
    """
    mine, its = unit(student), unit(teacher.detach())
    logits = [x @ queue.T for x in (mine, its)]
    own = [(x * its).sum(dim=1, keepdim=True) for x in (mine, its)]
    answers, wanted = (torch.cat(pair, dim=1) / temperature for pair in zip(own, logits, strict=True))
    return soft_targets(answers, wanted, 1.0)
