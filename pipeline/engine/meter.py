"""What is measured between two log lines. Values stay on the device until a line is due."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.core.digest import batch_digest
from pipeline.core.protocols import Batch, Clock, StepOutput
from pipeline.dist.group import sum_over_ranks
from pipeline.record.beats import Pulse

T = TypeVar("T")


class Meter:
    """The last step's loss and metrics over all ranks, the time since the last line, and what the rank is doing.

    Args:
        device: of the rank.
        world_size: ranks of the job.
        pulse: told of every step; None: nobody is.
    """

    def __init__(self, device: torch.device, world_size: int, pulse: Pulse | None = None) -> None:
        self.device = device
        self.world_size = world_size
        self.pulse = pulse
        self.loss = torch.zeros((), device=device)
        self._names: list[str] = []
        self._outputs: list[Tensor] = []
        self._digest = torch.zeros((), dtype=torch.int64, device=device)
        self._norm = torch.zeros((), device=device)
        self.restart()

    def restart(self) -> None:
        """Begin to measure time anew."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0
        self._samples = 0

    def at(self, phase: str, step: int | None = None) -> None:
        """What the rank does now; see :class:`pipeline.record.beats.Beat`."""
        if self.pulse is not None:
            self.pulse.at(phase, step)

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
        self._outputs.clear()
        self._digest.zero_()

    def add(self, output: StepOutput, batch: Batch) -> None:
        """Take in one micro-batch."""
        self._names = list(output.metrics)
        self._outputs.append(torch.stack([v.detach().float() for v in (output.loss, *output.metrics.values())]))
        self._digest += batch_digest(batch)

    def end_step(self, norm: Tensor, samples: int) -> None:
        """Close the step: the mean over the micro-batches."""
        self._mean = torch.stack(self._outputs).mean(0)
        self.loss = self._mean[0]
        self._norm = norm
        self._steps += 1
        self._samples += samples

    def line(self, clock: Clock, lr: float) -> dict[str, Any]:
        """The log line of the last step, over all ranks; begins a new stretch of time. Called on all ranks."""
        mean = (sum_over_ranks(self._mean.double()) / self.world_size).tolist()
        digest = int(sum_over_ranks(self._digest)) % 2**64
        seconds = time.perf_counter() - self._since
        line = {
            "step": clock.step,
            "samples": clock.samples,
            "loss": mean[0],
            **dict(zip(self._names, mean[1:], strict=True)),
            "lr": lr,
            "grad_norm": float(self._norm),
            "samples_per_second": self._samples / seconds,
            "data_wait": self._waited / seconds,
            "step_seconds": seconds / self._steps,
            "memory_gb": self._memory(),
            "data_digest": f"{digest:016x}",
        }
        self.restart()
        return line

    def _memory(self) -> float:
        """Peak memory in GB of this rank: of the device, or of the process where there is none."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
