"""The global batches are the same for every number of ranks and every number of loader processes."""

import itertools

import pytest
import torch

from pipeline.config.schema import Data, Image
from pipeline.data.stream import open_stream
from tests.unit.data.shards import write_data

GLOBAL, STEPS = 48, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), [35, 0, 39, 1, 50])


def batches(manifest, world, workers):
    """Global batches put together from all ranks, one after the other."""
    parts = []
    config = Data(train=manifest.root, fields=("image", "label"), image=Image(size=8), workers=workers, lanes=16)
    for rank in range(world):
        shape = {"global_batch": GLOBAL, "micro_batch": GLOBAL // world, "rank": rank, "world": world}
        stream = open_stream(config, manifest, seed=1, **shape)
        parts.append(list(itertools.islice(stream.batches(1), STEPS)))
        stream.close()
    return [
        {key: torch.cat([micro[key] for part in parts for micro in part[step]]) for key in parts[0][0][0]}
        for step in range(STEPS)
    ]


@pytest.fixture(scope="module")
def alone(data):
    return batches(data, world=1, workers=0)


# Each rank of these starts its own processes: the largest number of them goes with few ranks, and the other way round.
@pytest.mark.parametrize(
    ("world", "workers"),
    [(w, 0) for w in (2, 3, 4, 8, 16)]
    + [(1, 2), (2, 5)]
    + [pytest.param(w, k, marks=pytest.mark.slow) for w in (4, 8, 16) for k in (1, 2, 5)]
    + [pytest.param(w, k, marks=pytest.mark.slow) for w, k in ((1, 1), (1, 5), (2, 1), (2, 2), (3, 1), (3, 2), (3, 5))],
)
def test_every_number_of_ranks_and_of_workers(world, workers, data, alone):
    found = batches(data, world, workers)
    for ours, expected in zip(found, alone, strict=True):
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key]) for key in ours)
