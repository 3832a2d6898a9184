"""Moving averages of the trained parameters, kept where the optimizer keeps its part of them.

They follow the fp32 masters, piece by piece on the rank that holds the piece, so they cost no communication under any
ZeRO stage, and are saved as further named fragments: ``ema/NAME`` and ``ema-WIDTH/NAME``. Their only counter is the
run's clock, so that resuming cannot start a warm-up again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pipeline.config.schema import EmaConfig
from pipeline.core.protocols import Clock
from pipeline.engine.fragments import EMA, Fragment, Slot
from pipeline.nn.ema import decay, gamma_of, power_decay


def power_name(width: float) -> str:
    """What the power-function average of a relative width is called in a checkpoint."""
    return f"{EMA}-{width:g}"


class Ema:
    """The averages of one run; they begin as the parameters are.

    Args:
        config: which.
        slots: this rank's parts of the trainable parameters.
    """

    def __init__(self, config: EmaConfig, slots: Sequence[Slot]) -> None:
        self.config, self.slots = config, list(slots)
        self.parts = [s.updated.detach().view(-1)[s.offset : s.offset + s.count] for s in self.slots]
        assert all(part.dtype == torch.float32 for part in self.parts), "averages need the fp32 masters"
        self.gammas = {power_name(width): gamma_of(width) for width in config.power}
        self.averages: dict[str, list[Tensor]] = {
            name: [part.clone() for part in self.parts] for name in (EMA, *self.gammas)
        }

    def update(self, clock: Clock) -> None:
        """Take in the parameters after the update that ``clock`` counts."""
        for name, average in self.averages.items():
            gamma = self.gammas.get(name)
            keep = decay(self.config.decay, clock.step) if gamma is None else power_decay(gamma, clock.step)
            torch._foreach_lerp_(average, self.parts, 1 - keep)

    def begin(self) -> None:
        """Begin anew, as the parameters are now."""
        torch._foreach_copy_(self.averages[EMA], self.parts)

    def renew(self, names: Container[str]) -> None:
        """Begin anew with some parameters, as they are now."""
        for average in self.averages.values():
            for slot, own, part in zip(self.slots, average, self.parts, strict=True):
                if slot.name in names:
                    own.copy_(part)

    def fragments(self) -> Iterator[Fragment]:
        """Live views, for checkpoints."""
        for name, average in self.averages.items():
            for slot, part in zip(self.slots, average, strict=True):
                yield Fragment(f"{name}/{slot.name}", slot.start, part, slot.shape)

    @contextmanager
    def applied(self, publish: Callable[[], None]) -> Iterator[None]:
        """Inside, the model's parameters are their averages; all ranks enter and leave together.

        Args:
            publish: brings what the forward uses in line with the slots.
        """
        live = [part.clone() for part in self.parts]
        torch._foreach_copy_(self.parts, self.averages[EMA])
        publish()
        try:
            yield
        finally:
            torch._foreach_copy_(self.parts, live)
            publish()
