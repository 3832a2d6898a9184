"""Fixtures for all tests. World size is a marker: ``@pytest.mark.world_size(2)`` runs the test body in two gloo ranks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORKER = "SLUICE_TEST_RANK"


def free_port() -> int:
    """A port that is free at this moment on loopback."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """Environment of one rank of a gloo group on this machine."""
    return os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        WORKER: str(rank),
    }


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked with a world size in that many processes, each of them pytest on this one test."""
    mark = pyfuncitem.get_closest_marker("world_size")
    if mark is None or WORKER in os.environ or mark.args[0] == 1:
        return None
    world, port = mark.args[0], free_port()
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", pyfuncitem.nodeid]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=rank_environment(rank, world, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        outputs = [p.communicate(timeout=240)[0] for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    failed = [f"--- rank {r} ---\n{o}" for r, (p, o) in enumerate(zip(ranks, outputs, strict=True)) if p.returncode]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)
    return True
