"""One process group for the whole job, its start and end, and the small collectives that the loop needs.

The group is started by us, not by DeepSpeed or Accelerate, so that one time-out holds for every collective.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.core.errors import LaunchError, SluiceError
from pipeline.dist.collectives import gather_into

T = TypeVar("T")

_WORD_SECONDS = 1.0
"""How often a rank that works alone lets the others know that it does."""
LAUNCH_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
LONE_RANK |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: timedelta
    """Of every collective."""

    @property
    def first(self) -> bool:
        """Rank 0, which writes what is written once."""
        return self.rank == 0


def _launched() -> bool:
    missing = [v for v in LAUNCH_VARIABLES if v not in os.environ]
    if missing and "RANK" in os.environ:
        raise LaunchError(f"RANK is set but {', '.join(missing)} not; start ranks with `sluice train` or srun")
    return not missing


@contextmanager
def process_group(timeout_minutes: float) -> Iterator[Place]:
    """Join the job's group and leave it at the end; without a launcher's variables, a group of one.

    Raises:
        LaunchError: the launcher's variables are incomplete, or the other ranks cannot be reached in time.
    """
    timeout = timedelta(minutes=timeout_minutes)
    launched = _launched()
    alone: dict[str, Any] = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    with nullcontext() if launched else _lone_rank(), _joined(timeout, alone) as place:
        yield place


def backends(device: torch.device) -> str:
    """Of a process group whose ranks compute on such devices."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


@contextmanager
def _lone_rank() -> Iterator[None]:
    """What libraries read of a rank, where no launcher has said it; at the end the environment is as before."""
    before = {name: os.environ.get(name) for name in LONE_RANK}
    os.environ |= LONE_RANK
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _joined(timeout: timedelta, alone: dict[str, Any]) -> Iterator[Place]:
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(backends(device), timeout=timeout, **alone)
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(f"rank {os.environ['RANK']} cannot join the job at {where}: {error}") from error
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), local_rank, device, timeout)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def gather_rows(row: Tensor) -> Tensor:
    """Every rank's ``row``: [C] -> [W,C], the same on every rank."""
    world = dist.get_world_size()
    if world == 1:
        return row[None].clone()
    rows = row.new_empty(world * row.numel())
    gather_into(rows, row.contiguous())
    return rows.view(world, -1)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's ``value``; integers wrap around."""
    total = value.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_objects(value: T) -> list[T]:
    """Every rank's ``value``, pickled over the wire between the ranks of this job; for small, rare messages."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def by_first(work: Callable[[], T]) -> T:
    """Do ``work`` on rank 0; every rank gets its result, or raises the user's error that it raised."""
    result: T | None = None
    error: SluiceError | None = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except SluiceError as raised:
            error = raised
            error.everywhere = True
    result, error = from_first((result, error))
    if error is not None:
        raise error
    return cast("T", result)


def by_first_in_time(work: Callable[[], T]) -> T:
    """As :func:`by_first`, for work that takes longer than the time-out of a collective."""
    if dist.get_world_size() == 1:
        return by_first(work)
    pool = ThreadPoolExecutor(1) if dist.get_rank() == 0 else None
    try:
        begun = pool.submit(work) if pool is not None else None
        while not from_first(begun is not None and bool(wait([begun], _WORD_SECONDS).done)):
            pass
        return by_first(lambda: cast("Future[T]", begun).result())
    finally:
        if pool is not None:
            pool.shutdown(wait=False)


def by_all(work: Callable[[], T]) -> T:
    """Do ``work`` on every rank; if one or more cannot, all raise the first one's error, which is said once."""
    result: T | None = None
    error: SluiceError | None = None
    try:
        result = work()
    except SluiceError as raised:
        error = raised
    errors = gather_objects(error)
    failed = [rank for rank, found in enumerate(errors) if found is not None]
    if failed:
        first = cast("SluiceError", errors[failed[0]])
        text = str(first) if len(failed) == len(errors) else f"rank {failed[0]}: {first}"
        first.args, first.everywhere = (text,), True
        raise first
    return cast("T", result)


def from_first(value: T) -> T:
    """Rank 0's ``value``, on every rank."""
    if dist.get_world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
