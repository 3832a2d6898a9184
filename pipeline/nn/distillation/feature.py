"""What the teacher sees: losses on features.

Shape letters: B samples, C channels, h, w rows and columns of positions, P = h*w positions, D width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from pipeline.nn.distillation.full import in_full, unit
from pipeline.nn.distillation.response import soft_targets


def on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the grid of the coarser, whose positions average those of the finer: [B,C,h,w], [B,D,h,w].

    Args:
        student: [B,C,...]; pooled features stay as they are.
        teacher: [B,D,...].
    """
    if student.ndim == 2:
        return student, teacher
    height, width = (min(s, t) for s, t in zip(student.shape[2:], teacher.shape[2:], strict=True))
    mine, its = (functional.adaptive_avg_pool2d(x, (height, width)) for x in (student, teacher))
    return mine, its


@in_full
def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference.

    Romero et al., "FitNets: Hints for Thin Deep Nets" (ICLR 2015), eq. 3, as a mean over all that is compared.

    Args:
        student: behind the connector, [B,D,h,w] or pooled [B,D].
        teacher: [B,D,h,w] or [B,D].
    """
    mine, its = on_one_grid(student, teacher.detach())
    return (mine - its).square().flatten(1).mean(dim=1)


@in_full
def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of attention maps: sums of squares over channels, each map of length one.

    Zagoruyko and Komodakis, "Paying More Attention to Attention" (ICLR 2017), section 3.1, p = 2, as a mean over
    positions as in the authors' code.

    Args:
        student: [B,C,h,w].
        teacher: [B,D,h,w].
    """
    maps = (unit(x.square().mean(dim=1).flatten(1)) for x in on_one_grid(student, teacher.detach()))
    mine, its = maps
    return (mine - its).square().mean(dim=1)


@in_full
def tokens(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL between softmaxes over the channels of each position, a mean over positions.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation" (CVPR 2019), pixel-wise, on features.

    Args:
        student: behind the connector, [B,D,h,w].
        teacher: [B,D,h,w].
        temperature: T.
    """
    mine, its = (x.flatten(2).transpose(1, 2) for x in on_one_grid(student, teacher.detach()))  # [B,P,D]
    losses = soft_targets(mine.flatten(0, 1), its.flatten(0, 1), temperature)
    return losses.view(mine.shape[:2]).mean(dim=1)


@in_full
def self_similarity(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL between softmaxes over cosine / T of each position with all positions of its image, a mean over positions.

    Widths may differ, so no connector is needed.

    Args:
        student: [B,C,h,w].
        teacher: [B,D,h,w].
        temperature: T.
    """
    alike: list[Tensor] = []
    for x in on_one_grid(student, teacher.detach()):
        vectors = unit(x.flatten(2).transpose(1, 2))
        alike.append(vectors @ vectors.transpose(1, 2))  # [B,P,P]
    mine, its = (x / temperature for x in alike)
    losses = soft_targets(mine.flatten(0, 1), its.flatten(0, 1), 1.0)
    return losses.view(mine.shape[:2]).mean(dim=1)
