"""How many bits the images of a stream take, as a model of images knows it; each rank its share.

Shape letters: B samples of a batch, N of a stream, P numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import ConfigError
from pipeline.core.evaluation import EvalContext, Likely, Maker
from pipeline.core.protocols import Batch
from pipeline.dist.group import gather_objects
from pipeline.evals._samples import chosen, in_order, maker_of

TOLD = {"label": ("label",), "text": ("text", "text_length"), None: ()}
"""Fields of what a model is told."""


class Measured(NamedTuple):
    """Of all samples that were measured, in the order of their ids and the same on every rank."""

    names: tuple[str, ...]
    """What each of the P numbers is called; the first is the sum of the others: "bits_per_dim_exact"."""
    bits: Tensor
    """float64[N,P]."""
    beside: Tensor
    """What was made of each image beside it, float64[N]."""


def likely(ctx: EvalContext) -> Likely:
    """The generator, which must know how likely images are.

    Raises:
        ConfigError: it does not.
    """
    model: Maker = maker_of(ctx)
    if not isinstance(model, Likely):
        raise ConfigError("this evaluation needs a model that knows how likely images are; this one only makes them")
    return model


def measure(
    ctx: EvalContext,
    stream: str,
    beside: Callable[[Tensor], Tensor],
    *,
    seed: int,
    steps: int | None,
    samples: int | None = None,
) -> Measured:
    """Measure a stream; on all ranks together.

    Args:
        ctx: with the generator.
        stream: its name.
        beside: what else to keep of images, uint8[B,C,H,W] in main memory to float64[B].
        seed: of all chance.
        steps: see :class:`pipeline.core.evaluation.Likely`.
        samples: how many, drawn once for all; None: all.

    Raises:
        ConfigError: the suite's fields lack what the model is told.
    """
    model, fields, source = likely(ctx), TOLD[maker_of(ctx).told], ctx.streams[stream]
    wanted, names, rows = min(source.samples, samples or source.samples), list[str](), list[tuple[Tensor, ...]]()
    for batch in source:
        mine = chosen(batch["id"], source.samples, wanted)
        if not mine.any():
            continue
        part = {name: value[mine].to(ctx.place.device) for name, value in batch.items()}
        bits = model.likelihood(part["image"], part["id"], _prompt(part, fields), seed, steps)
        parts = {part: value for part, value in bits.parts.items() if part}
        names = [bits.name, *(f"{bits.name}_{part}" for part in parts)]
        columns = torch.stack([bits.total, *parts.values()], dim=1).double().cpu()
        rows.append((part["id"].cpu(), columns, beside(part["image"].cpu())))
    _, columns, kept = in_order(rows)
    named = next(known for known in gather_objects(names) if known)  # a rank may have measured nothing
    return Measured(tuple(named), columns, kept)


def _prompt(batch: Batch, fields: tuple[str, ...]) -> Batch:
    """What the images of a batch are of.

    Raises:
        ConfigError: the suite's fields lack it.
    """
    if missing := [name for name in fields if name not in batch]:
        raise ConfigError(f'the model is told "{missing[0]}": the suite\'s fields, or the data, lack it')
    return {name: batch[name] for name in fields}
