"""Work that may fail on any rank without taking the others along: all learn of it, none waits, and all go on together.

A rank that fails leaves its peers in a collective that never ends. So it says in the job's store why, and leaves the
process group, which ends the collectives of the others too. What each rank says is read from the store, which is no
collective; if one has failed, all join a new group.
"""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, NamedTuple, TypeVar

import torch.distributed as dist
from torch.distributed import distributed_c10d

from pipeline.core.errors import SluiceError
from pipeline.dist.group import Place, backends

T = TypeVar("T")

_POLL_SECONDS = 1.0


class Failure(NamedTuple):
    """Why work has failed, the same on every rank."""

    text: str
    """Names the rank where it is not the same on all."""
    trace: str
    """Of an error that is nobody's to mend by other input; else empty."""


class _Said(NamedTuple):
    """A rank that has failed."""

    order: int
    """1: it was the first."""
    rank: int
    text: str
    trace: str


class Held(NamedTuple, Generic[T]):
    """How work has ended on all ranks."""

    value: T | None
    """This rank's; None where one or more have failed."""
    failure: Failure | None
    """Of the rank that failed first."""


class Meeting:
    """Where the ranks of a job meet outside of their collectives.

    Args:
        place: of this rank; its group is there. What keeps a group of its own must not be used across a failure.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._store = distributed_c10d._get_default_store()
        self._number = 0

    def hold(self, work: Callable[[], T]) -> Held[T]:
        """Do ``work`` on every rank; all ranks call this together.

        Returns:
            On every rank the value, or on every rank the failure. Interrupts and exits are raised.
        """
        self._number += 1
        room = dist.PrefixStore(f"meeting {self._number}", self._store)
        value: T | None = None
        failure: Failure | None = None
        with self._ended_by_others(room):
            try:
                value = work()
            except Exception as error:
                failure = _failure(error)
        said: _Said | None = None
        if failure is not None:
            order = room.add("failed", 1) if self._place.world_size > 1 else 1
            said = _Said(order, self._place.rank, *failure)
            self._leave()
        failures = [said for said in self._exchange(room, said) if said is not None]
        if not failures:
            return Held(value, None)
        self._renew()
        first = min(failures)  # whoever failed later most likely did so because a peer had gone
        alike = len(failures) == self._place.world_size and len({said.text for said in failures}) == 1
        return Held(None, Failure(first.text if alike else f"rank {first.rank}: {first.text}", first.trace))

    def _leave(self) -> None:
        if self._place.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def _exchange(self, room: dist.PrefixStore, said: _Said | None) -> list[_Said | None]:
        """What each rank has to say."""
        if self._place.world_size == 1:
            return [said]
        ranks = [f"rank {rank}" for rank in range(self._place.world_size)]
        room.set(ranks[self._place.rank], json.dumps(said))
        room.wait(ranks, self._place.timeout)
        told = [json.loads(room.get(rank)) for rank in ranks]
        return [None if one is None else _Said(*one) for one in told]

    def _renew(self) -> None:
        """A new group in place of the one that some have left."""
        place = self._place
        if place.world_size == 1:
            return
        self._leave()
        store = dist.PrefixStore(f"group {self._number}", self._store)
        dist.init_process_group(
            backends(place.device), store=store, rank=place.rank, world_size=place.world_size, timeout=place.timeout
        )

    @contextmanager
    def _ended_by_others(self, room: dist.PrefixStore) -> Iterator[None]:
        """On accelerators a collective does not notice that a peer has left: it is ended when one says that it failed."""
        if self._place.device.type == "cpu" or self._place.world_size == 1:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_POLL_SECONDS):
                if room.check(["failed"]):
                    distributed_c10d._abort_process_group()
                    return

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


class MeetingApart(Meeting):
    """The same in a group of its own, for work beside that of the job, whose group and all that hold it stay as they are.

    A context manager: inside, the group of its own is the one that collectives use. All ranks enter and leave together.
    """

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._job = distributed_c10d._get_default_group()
        self._own: dist.ProcessGroup | None = None

    def __enter__(self) -> MeetingApart:
        """Make the group."""
        self._renew()
        return self

    def __exit__(self, *error: object) -> None:
        """Back to the job's."""
        self._leave()

    def _leave(self) -> None:
        distributed_c10d._update_default_pg(self._job)
        if self._own is not None:
            dist.destroy_process_group(self._own)
            self._own = None

    def _renew(self) -> None:
        if self._place.world_size == 1:
            return
        self._leave()
        made = dist.new_group(timeout=self._place.timeout, backend=backends(self._place.device))
        assert isinstance(made, dist.ProcessGroup)
        self._own = made
        distributed_c10d._update_default_pg(made)


def _failure(error: Exception) -> Failure:
    if isinstance(error, SluiceError):
        return Failure(str(error), "")
    return Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
