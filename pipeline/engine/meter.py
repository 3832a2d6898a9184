"""What is measured between two log lines. Values stay on the device until a line is due."""

from __future__ import annotations

import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from pipeline.core.digest import batch_digest
from pipeline.core.protocols import Batch, Clock, StepOutput
from pipeline.dist.collectives import all_gather
from pipeline.dist.group import sum_over_ranks
from pipeline.engine.ledger import Ledger
from pipeline.engine.pace import Pace
from pipeline.nn.spread import spread_of
from pipeline.record.beats import Pulse

T = TypeVar("T")
WATCHED = 256
"""Samples over all ranks whose features are looked at: enough to see a collapse, and few enough to cost nothing."""
FEWEST = 8
"""Samples of which a spread says something."""


class _Update(NamedTuple):
    """The last update of a phase."""

    names: list[str]
    """Of the metrics."""
    mean: Tensor
    """Loss and metrics over this rank's micro-batches."""
    rate: float
    norm: Tensor


class Meter:
    """The last step's loss and metrics over all ranks, the time since the last line, and what the rank is doing.

    Args:
        device: of the rank.
        world_size: ranks of the job.
        pulse: told of every step; None: nobody is.
        ledger: keeps the losses of samples; None: nobody does.
        pace: measures the rank's own time; None: nobody does.
    """

    def __init__(
        self,
        device: torch.device,
        world_size: int,
        pulse: Pulse | None = None,
        ledger: Ledger | None = None,
        pace: Pace | None = None,
    ) -> None:
        self.device = device
        self.world_size = world_size
        self.pulse = pulse
        self.ledger = ledger
        self.pace = pace
        self.own: tuple[float, ...] = ()
        """This rank's own seconds since the step before the last one ended, by phase."""
        self.loss = torch.zeros((), device=device)
        """Of the last step on this rank, added up over its updates."""
        self.norm = torch.zeros((), device=device)
        """Of the gradients of the last step, over its updates."""
        self.recent: deque[tuple[int, list[Tensor], list[Tensor | None]]] = deque(maxlen=2)
        """Of the last steps (a GPU's are judged one later): ids and losses of the samples, by micro-batch."""
        self._updates: dict[str, _Update] = {}
        self._spent: dict[str, float] = {}
        """Seconds by what they were spent on, beside steps."""
        self._names: list[str] = []
        self._outputs: list[Tensor] = []
        self._features: list[Tensor] = []
        """Of the last step's first update, by micro-batch."""
        self._digest = torch.zeros((), dtype=torch.int64, device=device)
        self.restart()

    def restart(self) -> None:
        """Begin to measure time anew."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._samples = 0
        self._spent = dict.fromkeys(self._spent, 0.0)

    def spend(self, name: str, seconds: float) -> None:
        """Count time that is spent on no step, under a name of its own in every line from now on."""
        self._spent[name] = self._spent.get(name, 0.0) + seconds

    def at(self, phase: str, step: int | None = None) -> None:
        """What the rank does now; see :class:`pipeline.record.beats.Beat`."""
        if self.pulse is not None:
            self.pulse.at(phase, step)
        if self.pace is not None:
            self.pace.at(phase)

    def timed(self, source: Iterator[T]) -> Iterator[T]:
        """``source``, with the time spent waiting for it counted."""
        while True:
            self.at("data")
            began = time.perf_counter()
            try:
                item = next(source)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield item

    def begin_step(self, step: int) -> None:
        """Forget the step before; ``step`` is the one that begins."""
        self.at("step", step)
        self.recent.append((step, [], []))
        self._updates.clear()
        self._features.clear()
        self._digest.zero_()

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Take in one micro-batch."""
        self._names = list(output.metrics)
        self._outputs.append(torch.stack([v.detach().float() for v in (output.loss, *output.metrics.values())]))
        if not self._updates:  # all updates of a step see the same batches
            self._digest += batch_digest(batch)
            self.recent[-1][1].append(batch["id"])
            self.recent[-1][2].append(output.losses)
            if output.features is not None:
                self._features.append(output.features)
            if self.ledger is not None:
                self.ledger.add(output, batch)

    def end_update(self, phase: str, rate: float, norm: Tensor) -> None:
        """Close an update: the mean over the micro-batches.

        Args:
            phase: "" where there are no phases.
            rate: learning rate.
            norm: of the gradient.
        """
        mean = torch.stack(self._outputs).mean(0)
        self._outputs.clear()
        self.loss = mean[0] + self.loss if self._updates else mean[0]
        self.norm = torch.hypot(self.norm, norm) if self._updates else norm
        self._updates[phase] = _Update(self._names, mean, rate, norm)

    def end_step(self, samples: int) -> None:
        """Close the step."""
        self._steps += 1
        self._samples += samples
        if self.pace is not None:
            self.own = self.pace.take()

    def line(self, clock: Clock) -> dict[str, Any]:
        """The log line of the last step, over all ranks; begins a new stretch of time. Called on all ranks.

        Where there are phases, what belongs to one has its name before it: "critic/loss", "critic/lr", of its last
        update in the step; "loss" is the sum of theirs.
        """
        means = torch.cat([update.mean for update in self._updates.values()]).double()
        values = iter((sum_over_ranks(means) / self.world_size).tolist())
        digest = int(sum_over_ranks(self._digest)) % 2**64
        seconds = time.perf_counter() - self._since
        facts: dict[str, float] = {}
        for phase, update in self._updates.items():
            before = f"{phase}/" if phase else ""
            facts |= {before + name: next(values) for name in ("loss", *update.names)}
            facts |= {before + "lr": update.rate, before + "grad_norm": float(update.norm)}
        line = {
            "step": clock.step,
            "samples": clock.samples,
            "loss": sum(facts[f"{phase}/loss" if phase else "loss"] for phase in self._updates),
            **facts,
            **self._spread(),
            "samples_per_second": self._samples / seconds,
            "data_wait": self._waited / seconds,
            "step_seconds": (seconds - sum(self._spent.values())) / self._steps,
            **self._spent,
            "memory_gb": self._memory(),
            "data_digest": f"{digest:016x}",
        }
        self.restart()
        return line

    def _spread(self) -> dict[str, float]:
        """How much of their space the features of the last step fill; see :mod:`pipeline.nn.spread`."""
        if not self._features:
            return {}
        own = torch.cat(self._features)[: -(-WATCHED // self.world_size)]
        everyone = all_gather(own.float())
        if len(everyone) < FEWEST:
            return {}
        std, rank = spread_of(everyone)
        return {"features_std": std, "features_rank": rank}

    def samples(self, step: int) -> dict[int, float | None]:
        """Of a recent step this rank's samples: id to loss, None where it is not told."""
        found: dict[int, float | None] = {}
        for number, ids, losses in self.recent:
            if number == step:
                for batch, own in zip(ids, losses, strict=True):
                    told = [None] * len(batch) if own is None else own.float().tolist()
                    found |= dict(zip(batch.tolist(), told, strict=True))
        return found

    def keep(self) -> None:
        """Write the losses of samples; on all ranks together."""
        if self.ledger is not None:
            self.ledger.flush()

    def _memory(self) -> float:
        """Peak memory in GB of this rank: of the device, or of the process where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
