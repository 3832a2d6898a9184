"""After every update the ranks tell each other their loss, whether they were asked to stop, how far saving is, and
how long they took by themselves.

So a loss that is not finite on one rank stops all of them in the same step and before any action can persist what it
did to the weights, a request to stop reaches all of them in the same step whoever got it, and a checkpoint that is
written in the background is published, or given up, by all of them together. On a GPU the numbers of
a step are looked at after the next one, so that the host never waits for the device; before an action runs, and at
the end, they are looked at at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.errors import NonFiniteError
from pipeline.dist.collectives import all_reduce
from pipeline.dist.group import gather_rows
from pipeline.engine.paces import PaceKeeper
from pipeline.engine.saving import Saver
from pipeline.engine.stopping import StopRequest


class _Pending(NamedTuple):
    step: int
    rows: Tensor
    """[W,4+P] on the host: loss, gradient norm, stop, progress of saving, own seconds of each phase."""
    ready: torch.cuda.Event | None


class Watch:
    """The ranks' agreement on going on.

    Args:
        device: of the rank.
        stop: whether this rank was asked to stop.
        saver: writes checkpoints in the background; None: nobody does.
        paces: takes in how long all ranks took; None: it is not kept, or by another rank.
    """

    def __init__(
        self, device: torch.device, stop: StopRequest, saver: Saver | None = None, paces: PaceKeeper | None = None
    ) -> None:
        self.stop = stop
        self.saver = saver
        self.paces = paces
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: deque[_Pending] = deque()
        self.stopping = False

    def exchange(self, step: int, loss: Tensor, norm: Tensor, own: Sequence[float] = ()) -> None:
        """Tell the others how this rank is; look at what has come back.

        Args:
            step: that was made.
            loss: of this rank.
            norm: of the gradient.
            own: seconds by phase, of this rank; as many on every rank.
        """
        progress = 0 if self.saver is None else self.saver.progress
        # new_full fills on the device; new_tensor would copy, and wait for the device
        told = [loss.new_full((), float(value)) for value in (self.stop.asked(), progress, *own)]
        row = torch.stack([value.detach().float() for value in (loss, norm, *told)])
        rows = gather_rows(row)
        ready = None
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(_Pending(step, rows, ready))
        self._look(self.lag)

    def ask(self) -> bool:
        """Whether a rank was asked to stop, in the middle of something long; all ranks ask together."""
        asked = all_reduce(torch.tensor(float(self.stop.asked())), dist.ReduceOp.MAX)
        self.stopping = self.stopping or bool(asked)
        return self.stopping

    def settle(self) -> None:
        """Look at every step so far: nothing may be persisted before."""
        self._look(0)

    def _look(self, keep: int) -> None:
        """Judge all steps but the last ``keep``.

        Raises:
            NonFiniteError: on every rank, naming step, rank and quantity.
            CheckpointError: on every rank, if one could not write its part of a checkpoint.
        """
        while len(self.pending) > keep:
            step, rows, ready = self.pending.popleft()
            if ready is not None:
                ready.synchronize()
            values = rows[:, :4].tolist()
            bad = [f"the loss of rank {rank} is {row[0]}" for rank, row in enumerate(values) if not _finite(row[0])]
            if not bad and not _finite(values[0][1]):
                bad = [f"the gradient's norm is {values[0][1]}"]
            if bad:
                error = NonFiniteError(
                    f"step {step}: {'; '.join(bad)}. Nothing of this step was saved; lower the learning rate, clip the "
                    "gradient or look at the batch, and start again to resume from the last checkpoint."
                )
                error.step = step
                raise error
            self.stopping = self.stopping or any(row[2] for row in values)
            if self.saver is not None:
                self.saver.told([int(row[3]) for row in values])
            if self.paces is not None:
                self.paces.add(step, rows[:, 4:])


def _finite(value: float) -> bool:
    return math.isfinite(value)
