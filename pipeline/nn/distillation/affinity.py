"""How strongly images and texts of the global batch belong to each other, as the teacher has it.

Shape letters: n pairs of this rank, N of all, E and D widths of student and teacher.
"""

from __future__ import annotations

from torch import Tensor

from pipeline.dist.collectives import all_gather, gather_with_gradient
from pipeline.nn.distillation.full import in_full


@in_full
def affinity(
    image: Tensor, text: Tensor, scale: Tensor, teacher_image: Tensor, teacher_text: Tensor, teacher_scale: float
) -> Tensor:
    """Cross-entropy of the student's softmax over all texts with the teacher's, for each image, and the other way.

    Wu et al., "TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance" (ICCV 2023), eq. 5; the mean
    of both directions. Each rank holds 4 n N numbers.

    Args:
        image: unit vectors [n,E].
        text: unit vectors [n,E].
        scale: [1], the student's inverse temperature.
        teacher_image: unit vectors [n,D].
        teacher_text: unit vectors [n,D].
        teacher_scale: the teacher's inverse temperature.

    Returns:
        float[n].
    """
    pairs = ((image, text, teacher_image, teacher_text), (text, image, teacher_text, teacher_image))
    losses = [
        -(
            (teacher_scale * its.detach() @ all_gather(theirs).T).softmax(dim=1)
            * (scale * mine @ gather_with_gradient(others).T).log_softmax(dim=1)
        ).sum(dim=1)
        for mine, others, its, theirs in pairs
    ]
    return (losses[0] + losses[1]) / 2
