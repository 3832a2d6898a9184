"""Images of a few samples, for figures."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from pipeline.core.evaluation import EvalContext
from pipeline.dist.group import gather_objects


def images_of(ctx: EvalContext, stream: str, ids: Collection[int]) -> dict[int, Tensor]:
    """uint8[C,H,W] of each sample of ``ids``, on every rank; the stream is read for them once more."""
    wanted, own = set(ids), dict[int, Tensor]()
    for batch in ctx.streams[stream]:
        for place, sample in enumerate(batch["id"].tolist()):
            if sample in wanted:
                own[sample] = batch["image"][place].cpu().clone()
    return {sample: image for part in gather_objects(own) for sample, image in part.items()}
