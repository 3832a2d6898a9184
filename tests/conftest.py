"""Fixtures for all tests. World size is a marker: ``@pytest.mark.world_size(2)`` runs the test body in two gloo ranks.

The ranks are forked from a server that has already imported torch and its friends, so they start in milliseconds and
in a clean state. Fixtures are made once, in pytest's own process, and handed to every rank; they must be picklable.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

RANK_TIMEOUT = 240.0
"""Seconds after which a rank that has not answered is killed and the test fails."""


def free_port() -> int:
    """A port that is free at this moment on loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank of a gloo group on this machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def _rank_main(connection: Connection, environment: dict[str, str], body: Callable[..., None], kwargs: Any) -> None:
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        body(**kwargs)
    except BaseException:
        connection.send(traceback.format_exc())
    else:
        connection.send(None)
    connection.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_ranks(world: int, body: Callable[..., None], **kwargs: Any) -> None:
    """Run ``body(**kwargs)`` in ``world`` processes with a launcher's environment; fail with all ranks' tracebacks.

    ``body`` must be importable (defined at the top of a test file).
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "timm", "deepspeed", "accelerate", "sklearn"])
    port = free_port()
    ranks = []
    for rank in range(world):
        here, there = context.Pipe()
        process = context.Process(target=_rank_main, args=(there, rank_environment(rank, world, port), body, kwargs))
        process.start()
        there.close()
        ranks.append((process, here))
    problems = []
    for rank, (process, here) in enumerate(ranks):
        try:
            problem = here.recv() if here.poll(RANK_TIMEOUT) else f"no answer within {RANK_TIMEOUT:.0f} s"
        except EOFError:
            process.join()
            problem = f"died with exit code {process.exitcode}"
        if problem:
            problems.append(f"--- rank {rank} of {world} ---\n{problem}")
    for process, _ in ranks:
        process.join(1 if problems else 20)
        process.kill()
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run the body of a test marked with a world size in that many ranks."""
    mark = pyfuncitem.get_closest_marker("world_size")
    if mark is None:
        return None
    names = pyfuncitem._fixtureinfo.argnames
    run_ranks(mark.args[0], pyfuncitem.obj, **{name: pyfuncitem.funcargs[name] for name in names})
    return True


@pytest.fixture
def lone_group() -> Iterator[None]:
    """A process group of one rank in pytest's own process, for code that takes a group for granted."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
