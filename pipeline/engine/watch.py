"""After every update the ranks tell each other two numbers: their loss, and whether they were asked to stop.

So a loss that is not finite on one rank stops all of them in the same step and before any action can persist what it
did to the weights, and a request to stop reaches all of them in the same step whoever got it. On a GPU the numbers of
a step are looked at after the next one, so that the host never waits for the device; before an action runs, and at
the end, they are looked at at once.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.core.errors import NonFiniteError
from pipeline.dist.group import gather_rows


class _Pending(NamedTuple):
    step: int
    rows: Tensor
    """[W,3] on the host: loss, gradient norm, stop."""
    ready: torch.cuda.Event | None


class Watch:
    """The ranks' agreement on going on."""

    def __init__(self, device: torch.device) -> None:
        self.lag = 1 if device.type == "cuda" else 0
        self.pending: deque[_Pending] = deque()
        self.stopping = False

    def exchange(self, step: int, loss: Tensor, norm: Tensor, asked: bool) -> None:
        """Tell the others this rank's loss, and whether it was asked to stop; look at what has come back."""
        row = torch.stack([loss.detach().float(), norm.detach().float(), loss.new_tensor(float(asked)).float()])
        rows = gather_rows(row)
        ready = None
        if rows.is_cuda:
            rows = rows.to("cpu", non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
        self.pending.append(_Pending(step, rows, ready))
        self._look(self.lag)

    def settle(self) -> None:
        """Look at every step so far: nothing may be persisted before."""
        self._look(0)

    def _look(self, keep: int) -> None:
        """Judge all steps but the last ``keep``.

        Raises:
            NonFiniteError: on every rank, naming step, rank and quantity.
        """
        while len(self.pending) > keep:
            step, rows, ready = self.pending.popleft()
            if ready is not None:
                ready.synchronize()
            values = rows.tolist()
            bad = [f"the loss of rank {rank} is {row[0]}" for rank, row in enumerate(values) if not _finite(row[0])]
            if not bad and not _finite(values[0][1]):
                bad = [f"the gradient's norm is {values[0][1]}"]
            if bad:
                raise NonFiniteError(
                    f"step {step}: {'; '.join(bad)}. Nothing of this step was saved; lower the learning rate, clip the "
                    "gradient or look at the batch, and start again to resume from the last checkpoint."
                )
            self.stopping = self.stopping or any(row[2] for row in values)


def _finite(value: float) -> bool:
    return math.isfinite(value)
