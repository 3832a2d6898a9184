"""An evaluation that does something wrong, or has something happen to it, after a collective of all ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn

from pipeline.config.schema import Strict
from pipeline.core.errors import DataError, NonFiniteError
from pipeline.core.evaluation import EvalContext, Evaluation, Number, Uses
from pipeline.dist.group import gather_objects

How = Literal[
    "fine", "trains", "statistics", "hidden buffer", "training mode", "crashes", "not finite", "killed", "data"
]


class Config(Strict):
    """What happens."""

    how: How
    rank: int | None = None
    """To this rank alone; left out: to all."""
    test: str = "val"


class Misbehave(Evaluation):
    """Reports "misbehave/images", the number of images, after reading them all."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def uses(self) -> Uses:
        """Images alone."""
        return Uses({self.config.test: ("image",)})

    def run(self, ctx: EvalContext) -> Iterator[Number]:
        """On each rank; the others of one that fails wait for it in a collective."""
        encoder = ctx.encoders["image"]
        read = sum(len(batch["id"]) for batch in ctx.streams[self.config.test])
        total = sum(gather_objects(read))
        if self.config.rank in (None, ctx.place.rank):
            self.happen(encoder, ctx)
        assert len(gather_objects(read)) == ctx.place.world_size
        yield Number("misbehave/images", float(total), total, self.config.test, better=None)

    def happen(self, encoder: nn.Module, ctx: EvalContext) -> None:
        """What is set."""
        ways: dict[How, Callable[[], None]] = {
            "trains": lambda: trains(encoder),
            "statistics": lambda: statistics(encoder, ctx),
            "hidden buffer": lambda: hidden_buffer(encoder),
            "training mode": lambda: next(m for m in encoder.modules() if not list(m.children())).train() and None,
            "crashes": crashes,
            "not finite": not_finite,
            "killed": lambda: killed(ctx),
            "data": data,
        }
        if self.config.how in ways:
            ways[self.config.how]()


def trains(encoder: nn.Module) -> None:
    """One weight moves in its last bits."""
    weight = next(p for p in encoder.parameters() if p.ndim > 1)
    weight.flatten()[0].mul_(1 + 1e-6)


def statistics(encoder: nn.Module, ctx: EvalContext) -> None:
    """Batch norm sees a batch in training mode, and is put back."""
    encoder.train()
    encoder(next(iter(ctx.streams["val"]))["image"])
    encoder.eval()


def hidden_buffer(encoder: nn.Module) -> None:
    """What no checkpoint holds changes too."""
    module = next(m for m in encoder.modules() if m._non_persistent_buffers_set)
    next(b for name, b in module.named_buffers(recurse=False) if name in module._non_persistent_buffers_set).add_(1)


def crashes() -> None:
    """A mistake of the evaluation."""
    torch.zeros(3) @ torch.zeros(4)


def not_finite() -> None:
    """As the loop says it."""
    raise NonFiniteError("the loss is nan")


def data() -> None:
    """As a stream says it."""
    raise DataError("sample 7 is damaged")


def killed(ctx: EvalContext) -> None:
    """The first time, without warning, when all that came before is written; not the second time."""
    seen = ctx.folder / "seen"
    if not seen.exists():
        seen.parent.mkdir(parents=True, exist_ok=True)
        seen.touch()
        os.kill(os.getpid(), signal.SIGKILL)
