"""One SLURM cluster for all tests of this folder, and an undisturbed run to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.runs import codes, overrides, run
from tests.slurm.cluster import Cluster, why_not
from tests.slurm.jobs import OWN


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes, n1 to n3, in the partitions "work" and, before it, "urgent"."""
    if reason := why_not():
        pytest.skip(reason)
    with Cluster(["n1", "n2", "n3"]) as running:
        yield running


@pytest.fixture(scope="session")
def whole(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run, as :func:`tests.slurm.jobs.train` makes it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert codes(run(2, "supervised", overrides(folder, glyphs / "train", *OWN))) == [0, 0]
    return folder


@pytest.fixture
def shards(glyphs: Path, cluster: Cluster) -> Path:
    """Data, and a cluster on which nobody else is."""
    cluster.empty()
    return glyphs / "train"
