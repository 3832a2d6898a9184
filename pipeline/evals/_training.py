"""What a training inside of an evaluation takes from the suite, where its settings leave it out."""

from __future__ import annotations

from pipeline.config.schema import Training
from pipeline.core.evaluation import EvalContext, EvalStream
from pipeline.dist.group import gather_objects


def settled(training: Training, ctx: EvalContext, stream: str) -> Training:
    """With random crops of the size of the stream's images, unless ``image`` is set, and micro-batches of no more than
    a rank's share. All ranks call this together.
    """
    share = max(1, training.global_batch // ctx.place.world_size)
    more: dict[str, object] = {"micro_batch": min(training.micro_batch, share)}
    if "image" not in training.model_fields_set:
        more["image"] = training.image.model_copy(update={"size": _size(ctx.streams[stream])})
    return training.model_copy(update=more)


def _size(stream: EvalStream) -> tuple[int, int]:
    """Height and width of a stream's images; a rank without any learns it from the others."""
    own = next((tuple(batch["image"].shape[-2:]) for batch in stream), None)
    height, width = next(size for size in gather_objects(own) if size is not None)
    return height, width
