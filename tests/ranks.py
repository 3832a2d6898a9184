"""Ranks for tests: processes forked from a server that has already imported torch and its friends.

They start in milliseconds and in a clean state, with the environment that a launcher gives.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import random
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any, NamedTuple

PRELOADED = [
    "torch.distributed",
    "torch.utils.tensorboard",
    "timm",
    "deepspeed.module_inject",
    "accelerate",
    "sklearn.linear_model",
    "matplotlib.figure",
    "pipeline.run.train",
    "pipeline.suites.evaluate",
    "pytest",
    "hypothesis.strategies",
    "tests.contracts.components",
    "tests.integration.runs",
    "tests.components",
]
"""What takes long to import, and is the same in every test: the module of a body imports little else."""
RANK_TIMEOUT = 240.0
"""Seconds after which a rank that has not answered is killed."""


class Ended(NamedTuple):
    """How a rank ended."""

    exit_code: int | None
    """None: it had to be killed; negative: the signal that it died of."""
    value: Any
    """What the body returned."""
    problem: str | None
    """The traceback, or that it died or did not answer."""


_PORTS = count(random.SystemRandom().randrange(20000))


def free_port() -> int:
    """A port that is free on loopback, and is given to nobody else before it is used.

    Ports that the system gives away by itself would not do: any process may be given one in the meantime.
    """
    while True:
        port = 11000 + next(_PORTS) % 20000
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


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


def _rank_main(connection: Connection, environment: dict[str, str], body: Callable[..., Any], kwargs: Any) -> None:
    os.environ.update(environment)
    gc.freeze()  # what the server has imported stays: no collection of this process looks at it
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    try:
        answer = (body(**kwargs), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(answer)
    connection.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def forkserver() -> ForkServerContext:
    """Processes that start in milliseconds, since their server has imported what takes long."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def start_ranks(world: int, body: Callable[..., Any], **kwargs: Any) -> list[Ended]:
    """Run ``body(**kwargs)`` in ``world`` processes and wait for all of them.

    ``body`` must be importable (defined at the top of a test file), ``kwargs`` and what it returns picklable.
    """
    context = forkserver()
    port = free_port()
    ranks = []
    for rank in range(world):
        here, there = context.Pipe()
        process = context.Process(target=_rank_main, args=(there, rank_environment(rank, world, port), body, kwargs))
        process.start()
        there.close()
        ranks.append((process, here))
    ended = []
    for process, here in ranks:
        value, problem = None, None
        try:
            value, problem = here.recv() if here.poll(RANK_TIMEOUT) else (None, f"no answer in {RANK_TIMEOUT:.0f} s")
        except EOFError:
            process.join()
            problem = f"died with exit code {process.exitcode}"
        process.join(20 if problem is None else 5)
        process.kill()
        ended.append(Ended(process.exitcode, value, problem))
    return ended
