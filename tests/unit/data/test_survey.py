"""A survey sees every sample of any of a run's data sets once, whatever the ranks, and replaces what it cannot use."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest
import torch

from pipeline.config.schema import Beside, Data, Image, Source
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from pipeline.data.stream import open_stream
from pipeline.data.survey import open_survey
from tests.unit.data.shards import members, write_data

SIZES = {"a": [5, 4], "b": [3], "c": [7, 6]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for name, shards in SIZES.items():
        write_data(folder / name, shards, lambda number: members(number) if number != 8 else {"png": b"<", "cls": b"1"})
    return folder


def settings(folder, **more):
    train = (Source(path=str(folder / "a")), Source(path=str(folder / "b")))
    beside = {"near": Beside(path=str(folder / "b"), image=Image(size=6)), "far": Beside(path=str(folder / "c"))}
    more = {"workers": 0, "max_bad": 1, "image": Image(size=(8, 10))} | more
    return Data(train=train, fields=("image", "label"), beside=beside, **more)


def look(folder, name, world, batch=4, **more):
    """All ranks' batches, rank 0's first."""
    data = settings(folder, **more)
    found = []
    for rank in range(world):
        stream = open_survey(data, load(data.train), name, batch=batch, seed=1, rank=rank, world=world)
        with closing(stream):
            batches = [*stream]
            assert len(batches) in (stream.batches, stream.batches - 1)
            again = [*stream]
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(batches, again, strict=True))
        found += batches
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "ids", "shape"),
    [
        # number 8 of a cannot be read, and 9 follows it: the first of b
        ("", [*range(8), 9, *range(9, 12)], (8, 10)),
        ("near", range(12, 15), (6, 6)),
        ("far", [*range(15, 23), *range(24, 25), *range(24, 28)], (8, 10)),
    ],
)
def test_every_sample_comes_once_in_order_with_the_ids_of_training(folder, name, ids, shape, world):
    batches = look(folder, name, world)
    assert torch.cat([b["id"] for b in batches]).tolist() == [*ids]
    assert {tuple(b["image"].shape[1:]) for b in batches} == {(3, *shape)}
    assert all(("label" in b) == (name == "") for b in batches)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_part_is_drawn_once_for_all_ranks(folder, world):
    data, ids = settings(folder), list[int]()
    for rank in range(world):
        stream = open_survey(data, load(data.train), "far", batch=2, seed=1, rank=rank, world=world, samples=3)
        with closing(stream):
            batches = [*stream]
        assert batches and len(batches) in (stream.batches, stream.batches - 1)
        ids += torch.cat([b["id"] for b in batches]).tolist()
    drawn = sorted(np.random.default_rng(0).choice(13, max(3, world), replace=False) + 15)
    assert ids == [number + (number == 23) for number in drawn]  # 23 cannot be read, and 24 follows it
    with closing(open_survey(data, load(data.train), "far", batch=2, seed=1, rank=0, world=1, samples=99)) as stream:
        assert sum(len(b["id"]) for b in stream) == 13


def test_pixels_do_not_depend_on_ranks_batches_or_workers(folder):
    whole = torch.cat([b["image"] for b in look(folder, "far", 1)])
    for others in (look(folder, "far", 3, batch=2), look(folder, "far", 1, workers=2)):
        assert torch.equal(torch.cat([b["image"] for b in others]), whole)


def test_ids_are_those_of_training(folder):
    data = settings(folder, tail="endless", image=Image(size=(8, 10), crop="center"))
    surveyed = {}
    for name in ("", "near", "far"):
        with closing(open_survey(data, load(data.train), name, batch=4, seed=1, rank=0, world=1)) as stream:
            surveyed |= {int(i): image for b in stream for i, image in zip(b["id"], b["image"], strict=True)}
    trained = open_stream(data, load(data.train), seed=1, global_batch=2, micro_batch=2, rank=0, world=1)
    with closing(trained):
        batches = trained.batches(0)
        for _ in range(8):
            (batch,) = next(batches)
            for prefix in ("", "far_"):
                for number, image in zip(batch[f"{prefix}id"], batch[f"{prefix}image"], strict=True):
                    assert torch.equal(surveyed[int(number)], image)


def test_what_cannot_be_is_said(folder):
    data = settings(folder)
    with pytest.raises(ConfigError, match=r"data set 'fra', which is not beside the first \(there: near, far\)"):
        open_survey(data, load(data.train), "fra", batch=4, seed=1, rank=0, world=1)
    with pytest.raises(ConfigError, match="a survey of 3 samples cannot be shared out to 4 ranks"):
        open_survey(data, load(data.train), "near", batch=4, seed=1, rank=0, world=4)
    with pytest.raises(DataError, match=r"1 of 12 samples could not be used in a survey, more than data.max_bad"):
        look(folder, "", 1, batch=12, max_bad=0.01)
