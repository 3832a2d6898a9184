"""Where a rank waits for others: what it spends inside of collectives.

All ranks of a synchronous run need the same time for a step, since the fast ones wait for the slow. What tells them
apart is a rank's own time, which is the step's less what was spent waiting, wherever that was: libraries begin and wait
for collectives inside of forward and backward. So torch's own entries are what is timed here. It adds no collective
and no synchronisation, and changes no number.

On a CPU the host waits, and its clock says how long. On a GPU the host runs ahead: there an event before and one after
the call, on the stream that computes, are read when the step is long over. The time between the two is that in which
this stream did nothing but what the call has put on it, also where a library communicates on a stream of its own and
lets the computing one, or the host, wait for that.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_reduce"),
    *("all_reduce_coalesced", "all_to_all", "all_to_all_single", "barrier", "broadcast", "broadcast_object_list"),
    *("gather", "gather_object", "recv", "reduce", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor"),
    *("scatter", "scatter_object_list", "send"),
)
"""Functions of ``torch.distributed`` that wait; some versions lack some."""


class Waits:
    """Measures what this process waits for others, while :meth:`listening`.

    Args:
        device: of the rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        """That the host has spent in collectives so far."""
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] | None = None
        """On a GPU, while somebody wants them: before and after each wait."""
        self._inside = False

    @contextmanager
    def listening(self) -> Iterator[Waits]:
        """Inside, waits are measured. One at a time in a process."""
        places = [(dist, name) for name in COLLECTIVES if hasattr(dist, name)] + [(dist.Work, "wait")]
        if self.device.type == "cuda":
            stream = torch.cuda.Stream
            places += [(stream, "wait_stream"), (stream, "wait_event"), (stream, "synchronize")]
            places.append((torch.cuda, "synchronize"))
        before = [(owner, name, getattr(owner, name)) for owner, name in places]
        for owner, name, call in before:
            setattr(owner, name, self._timed(call))
        try:
            yield self
        finally:
            for owner, name, call in before:
                setattr(owner, name, call)

    def mark(self) -> torch.cuda.Event:
        """An event on the stream that computes."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.default_stream(self.device))
        return event

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        cpu, main = self.device.type == "cpu", threading.get_ident()

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            # One is made of others. On a CPU autograd runs in the thread that asks for it; of a GPU it has its own.
            if self._inside or (cpu and threading.get_ident() != main):
                return call(*args, **kwargs)
            self._inside = True
            first = None if self.events is None else self.mark()
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began
                if self.events is not None and first is not None:
                    self.events.append((first, self.mark()))
                self._inside = False

        return timed
