"""What both engines share: the interface that the loop and the checkpoints use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pipeline.core.protocols import Average, Batch, Clock, Objective, StepContext, StepOutput
from pipeline.dist.group import Place
from pipeline.engine import fragments, optimizers
from pipeline.engine.asked import Built
from pipeline.engine.ema import Ema
from pipeline.engine.fragments import Fragment, Slot, Spec
from pipeline.engine.resting import Resting


class Turn(NamedTuple):
    """One update of a step."""

    phase: str
    """See :meth:`Objective.phases`; "" where there are none."""
    repeat: int
    """Updates that the phase has made in this step."""
    engine: SingleEngine


class BaseEngine(ABC):
    """What the loop and checkpoints see: the updates of a step, and how parameters and state are spread over ranks."""

    objective: Objective
    place: Place
    precision: str
    """"bf16" or "fp32"; see :class:`pipeline.config.schema.EngineConfig`."""
    ema: Ema | None = None
    """Moving averages of the trained parameters."""
    resting: Resting | None = None
    """Which modules are in eval mode while their parameters are frozen."""

    @abstractmethod
    def turns(self) -> Iterator[Turn]:
        """The updates of a step, in order; each is made before the next is asked for."""

    @abstractmethod
    def trained(self, *, writing: bool) -> Iterator[Fragment]:
        """This rank's parts of the trainable parameters and of the optimizers' state."""

    @abstractmethod
    def make_state(self, specs: dict[str, Spec]) -> None:
        """Make room for the optimizers' state that a checkpoint holds."""

    @abstractmethod
    def slots(self) -> list[Slot]:
        """Where this rank's parts of the trainable parameters are."""

    replicated: bool
    """Every rank holds every trainable parameter whole."""

    def publish(self) -> None:
        """Bring what the forward uses in line with the slots, after a checkpoint was read into them."""
        return None

    def whole_parameters(self) -> AbstractContextManager[None]:
        """Inside, every rank can read every parameter of ``objective`` whole."""
        return nullcontext()

    def before_step(self, clock: Clock) -> None:
        """Freeze what is not trained in the step that follows."""
        if self.resting is not None:
            self.resting.begin(clock.step)
        self.begin_step(clock)

    @abstractmethod
    def begin_step(self, clock: Clock) -> None:
        """Tell the optimizers of the step that follows."""

    def after_step(self, clock: Clock) -> None:
        """Bring what follows the trained parameters in line with them."""
        with torch.no_grad():
            self.hold(self.objective.limits())
            self.follow(self.objective.averages(clock))
            if self.ema is not None:
                self.ema.update(clock)
            self.objective.after_step(clock)

    def renew(self, values: Mapping[str, Tensor]) -> None:
        """Give trained parameters other values, the same on every rank; optimizers and averages begin anew with them.

        AdamW's count of steps is one for many parameters and goes on.
        """
        if not values:
            return
        with torch.no_grad():
            for fragment in self.trained(writing=False):
                kind, name = fragment.name.split("/", 1)
                if kind == fragments.MODEL and name in values:
                    end = fragment.start + fragment.data.numel()
                    fragment.data.copy_(values[name].flatten()[fragment.start : end])
                elif kind == fragments.OPTIMIZER and name.split("/", 1)[1] in values and fragment.shape:
                    fragment.data.zero_()
            self.publish()
            if self.ema is not None:
                self.ema.renew(values.keys())

    def look(self, survey: str, batch: Batch, ctx: StepContext) -> dict[str, Tensor]:
        """The objective's look at a batch, under the engine's precision."""
        bf16 = self.precision == "bf16"
        with torch.autocast(self.place.device.type, torch.bfloat16, enabled=bf16):
            return self.objective.look(survey, self.move(batch), ctx)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the parameters are their moving averages, if there are any."""
        return nullcontext() if self.ema is None else self.ema.applied(self.publish)

    def follow(self, averages: Iterable[Average]) -> None:
        """Move frozen parameters a step towards trained ones."""
        for target, source, keep in averages:
            target.lerp_(source, 1 - keep)

    def hold(self, limits: Mapping[str, tuple[float, float]]) -> None:
        """Clamp trained parameters, both what the forward uses and what the optimizer updates."""
        if not limits:
            return
        parts = [(slot.name, slot.updated.view(-1)[slot.offset :][: slot.count]) for slot in self.slots()]
        for name, tensor in (*self.objective.named_parameters(), *parts):
            if name in limits:
                tensor.clamp_(*limits[name])

    def move(self, batch: Batch) -> Batch:
        """The batch on this rank's device."""
        return {name: value.to(self.place.device, non_blocking=True) for name, value in batch.items()}

    def shared(self) -> Iterator[Fragment]:
        """State that every rank holds whole."""
        yield from fragments.untrained(self.objective)
        if self.replicated:
            yield from self.trained(writing=False)
            if self.ema is not None:
                yield from self.ema.fragments()

    def exclusive(self, *, writing: bool) -> Iterator[Fragment]:
        """State of which this rank alone holds its part."""
        if not self.replicated:
            yield from self.trained(writing=writing)
            if self.ema is not None:
                yield from self.ema.fragments()

    def held(self) -> Iterator[Fragment]:
        """All state on this rank, as live views: what a checkpoint is read into."""
        yield from self.shared()
        yield from self.exclusive(writing=False)

    def written(self) -> Iterator[Fragment]:
        """What this rank writes into a checkpoint: over all ranks, every element exactly once."""
        for fragment in self.shared():
            mine = fragments.share(fragment, self.place.rank, self.place.world_size)
            if mine is not None:
                yield mine
        yield from self.exclusive(writing=True)

    def expected(self) -> dict[str, Spec]:
        """Every tensor of the model that a checkpoint must hold."""
        found = fragments.named_tensors(self.objective)
        return {f"{fragments.MODEL}/{n}": Spec(self.shape_of(t), str(t.dtype)[6:]) for n, t in found.items()}

    def shape_of(self, tensor: Tensor) -> tuple[int, ...]:
        """Shape of a whole parameter or buffer."""
        return tuple(tensor.shape)


class SingleEngine(BaseEngine):
    """One optimizer over all parameters that require a gradient while it is built.

    The gradient that ``update`` applies is the mean over ranks and accumulated micro-batches of each loss's gradient.
    """

    optimizer: torch.optim.Optimizer
    """The torch optimizer, whose groups hold the learning rates and whose state is saved."""

    @abstractmethod
    def built(self) -> Built:
        """What the library has made of what was asked for, as it says itself."""

    @abstractmethod
    def call(self, batch: Batch, ctx: StepContext, **how: Any) -> Any:
        """The objective's forward under the engine's precision; the batch is on the device."""

    def forward(self, batch: Batch, ctx: StepContext, *, last: bool) -> StepOutput:
        """Loss and metrics of a micro-batch; ``last``: see below."""
        return self.call(batch, ctx)

    @abstractmethod
    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss`` over the accumulation; ``last`` is the micro-batch that ends it."""

    @abstractmethod
    def update(self, lr: float) -> Tensor:
        """Clip, step and clear. Returns the norm of the whole gradient before clipping: a scalar on the device."""

    @override
    def turns(self) -> Iterator[Turn]:
        yield Turn("", 0, self)

    @override
    def begin_step(self, clock: Clock) -> None:
        optimizers.begin_step(self.optimizer, clock)

    @override
    def trained(self, *, writing: bool) -> Iterator[Fragment]:
        return fragments.trained(self.slots(), self.optimizer, writing=writing)

    @override
    def make_state(self, specs: dict[str, Spec]) -> None:
        fragments.make_state(self.slots(), self.optimizer, specs)
