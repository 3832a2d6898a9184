"""Pictures of which captions and images a CLIP brings together."""

from __future__ import annotations

from torch import Tensor

from pipeline.core.protocols import Batch, Picture, StepContext
from pipeline.nn.pictures import Line, beneath, beside, verdict

SHOWN = 8
"""Samples in the showcase."""
NEAREST = 3
"""Of them, what is shown as nearest to each."""


def nearest_pictures(batch: Batch, cosines: Tensor, ctx: StepContext) -> dict[str, Picture]:
    """The captions nearest to each image, and the images nearest to each caption.

    Args:
        batch: the samples that are shown.
        cosines: of images (rows) and texts, [B,B].
        ctx: reads the texts.
    """
    cosines = cosines.float().cpu()
    words = ctx.words(batch) if ctx.words else [f"caption {number}" for number in range(len(cosines))]
    nearest = min(NEAREST, len(words))
    captions = finds(cosines, nearest, words)
    images = finds(cosines.T, nearest, [""] * len(words))
    found = cosines.T.topk(nearest, dim=1).indices
    hits = [sum(line[0].colour == verdict(True) for line in lines) for lines in (captions, images)]
    said = f"among {len(words)} shown; green: its own. First of all it is for"
    return {
        "captions": Picture(
            beside(batch["image"], captions), f"The captions nearest to each image {said} {hits[0]} of them."
        ),
        "images": Picture(
            beneath(words, [batch["image"][row.to(batch["image"].device)] for row in found], images),
            f"The images nearest to each caption {said} {hits[1]} of them.",
        ),
    }


def finds(cosines: Tensor, count: int, names: list[str]) -> list[list[Line]]:
    """The ``count`` largest of each row, with their names: cosine and name, green on the diagonal."""
    best = cosines.topk(count, dim=1)
    pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [
        [Line(f"{c:.2f}  {names[i]}".rstrip(), verdict(i == own)) for c, i in zip(values, indices, strict=True)]
        for own, (values, indices) in enumerate(pairs)
    ]
