"""One SLURM cluster for all tests of this folder, and for those in tests/faults that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, why_not


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes, n1 to n3, in the partitions "work" and, before it, "urgent"."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(["n1", "n2", "n3"]) as running:
        yield running
