"""The stream in one process: order, pixels, resume, bad samples, and what is refused."""

import itertools
import json

import numpy as np
import pytest
import torch

from pipeline.config.schema import Data, Image
from pipeline.core.digest import data_digest
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.data.order import Order
from pipeline.data.stream import open_stream
from tests.unit.data.shards import members, write_data

SIZES = [5, 0, 9, 1, 20, 13]
IMAGE = Image(size=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), SIZES)


def open_rank(manifest, *, rank=0, world=1, batch=16, micro=2, seed=1, **settings):
    settings = {"fields": ("image", "label"), "image": IMAGE, "workers": 0} | settings
    config = Data(train=manifest.root, **settings)
    return open_stream(config, manifest, seed=seed, global_batch=batch, micro_batch=micro, rank=rank, world=world)


def steps_of(manifest, first, count, *, world=1, **settings):
    """Global batches of steps first to first + count, put together from all ranks."""
    parts = []
    for rank in range(world):
        stream = open_rank(manifest, rank=rank, world=world, **settings)
        parts.append(list(itertools.islice(stream.batches(first), count)))
        stream.close()
    return [
        {key: torch.cat([micro[key] for part in parts for micro in part[step]]) for key in parts[0][0][0]}
        for step in range(count)
    ]


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_batch(data):
    stream = open_rank(data, image=Image(size=(8, 6), views=2), micro=4)
    parts = next(stream.batches(0))
    assert len(parts) == 4
    for batch in parts:
        shapes = {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()}
        assert shapes == {
            "id": (torch.int64, (4,)),
            "epoch": (torch.int64, (4,)),
            "image": (torch.uint8, (4, 3, 8, 6)),
            "image2": (torch.uint8, (4, 3, 8, 6)),
            "label": (torch.int64, (4,)),
        }
        assert torch.equal(batch["label"], batch["id"] % 7)
        assert not torch.equal(batch["image"], batch["image2"])


@pytest.mark.parametrize("tail", ["drop", "endless"])
@pytest.mark.parametrize(("world", "micro"), [(1, 16), (2, 4), (4, 1), (8, 2), (16, 1)])
def test_ids_and_pixels_do_not_depend_on_ranks_and_micro_batches(data, world, micro, tail):
    assert_same(
        steps_of(data, 0, 4, tail=tail, lanes=4), steps_of(data, 0, 4, world=world, micro=micro, tail=tail, lanes=4)
    )


def test_three_ranks(data):
    assert_same(steps_of(data, 1, 2, batch=12, micro=12), steps_of(data, 1, 2, batch=12, micro=2, world=3))


def test_order_is_the_plan(data):
    order = Order(np.array(data.starts), 1, 16, 4, 4, "endless")
    for step, batch in enumerate(steps_of(data, 0, 7, tail="endless", lanes=4)):
        place = order.batch(step, 0, 16)
        assert batch["id"].tolist() == place.id.tolist() and batch["epoch"].tolist() == place.epoch.tolist()


def test_every_sample_once_with_its_own_picture(data):
    batches = steps_of(data, 0, 3, image=Image(size=8, crop="resize"), tail="endless")
    ids = torch.cat([b["id"] for b in batches])
    assert sorted(ids.tolist()) == list(range(48))
    again = steps_of(data, 3, 3, image=Image(size=8, crop="resize"), tail="endless")
    pictures = {i: p for b in batches for i, p in zip(b["id"].tolist(), b["image"], strict=True)}
    for batch in again:
        assert (batch["epoch"] == 1).all()
        assert all(torch.equal(pictures[i], p) for i, p in zip(batch["id"].tolist(), batch["image"], strict=True))


def test_crops_change_with_the_epoch(data):
    first, second = (steps_of(data, epoch * 3, 3, tail="endless") for epoch in (0, 1))
    pictures = {i: p for b in first for i, p in zip(b["id"].tolist(), b["image"], strict=True)}
    same = [torch.equal(pictures[i], p) for b in second for i, p in zip(b["id"].tolist(), b["image"], strict=True)]
    assert sum(same) < 5


def test_elastic_resume_loses_and_repeats_nothing(data):
    """Kills and changes of world size over three epochs give the sample ids of one undisturbed run."""
    whole = steps_of(data, 0, 9, tail="endless")
    assert len({(e, i) for b in whole for e, i in zip(b["epoch"].tolist(), b["id"].tolist(), strict=True)}) == 9 * 16
    at, pieces = 0, []
    for world, length in ((1, 1), (4, 3), (2, 1), (8, 2), (16, 2)):
        pieces += steps_of(data, at, length, world=world, micro=1, tail="endless")
        at += length
    assert_same(whole, pieces)


def test_digest_of_a_step_is_the_same_for_all_splits(data):
    one, many = (steps_of(data, 2, 1, world=world)[0]["id"] for world in (1, 8))
    assert torch.equal(data_digest(one), sum(data_digest(part) for part in many.split(2)))


def test_state_goes_through_json_and_is_checked(data):
    stream = open_rank(data)
    state = json.loads(json.dumps(stream.state(7)))
    assert state["step"] == 7
    open_rank(data, rank=3, world=8).check(state)
    for change in ({"seed": 2}, {"batch": 8, "lanes": 4}, {"lanes": 2}, {"window": 1}, {"tail": "endless"}):
        with pytest.raises(CheckpointError, match=r"checkpoint .*, now"):
            open_rank(data, **change).check(state)


def test_state_of_other_data_is_refused(data, tmp_path):
    other = write_data(tmp_path, [20, 28])
    with pytest.raises(CheckpointError, match="manifest"):
        open_rank(other, lanes=4).check(open_rank(data, lanes=4).state(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 15}, "run.global_batch = 15 is not a multiple of 1 ranks x engine.micro_batch = 2"),
        ({"world": 3}, "run.global_batch = 16 is not a multiple of 3 ranks"),
        ({"batch": 64}, "run.global_batch = 64 takes 64 samples of .*, which has 48"),
        ({"lanes": 3}, "data.lanes = 3 does not divide the 16 samples of a batch"),
        ({"fields": ("imag",)}, "unknown field 'imag'; did you mean 'image'"),
    ],
)
def test_refused_settings(data, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_rank(data, **settings)


def test_field_that_the_data_lacks(tmp_path):
    manifest = write_data(tmp_path, [8], lambda n: {"png": members(n)["png"]}, {"image": ("png",)})
    with pytest.raises(ConfigError, match="has no field 'label', only image"):
        open_rank(manifest, batch=4)


def spoil(bad):
    """Samples of which those in ``bad`` hold no readable image."""
    return lambda n: {"cls": str(n % 7).encode(), "png": b"<html>" if n in bad else members(n)["png"]}


def test_bad_samples_are_replaced_and_noted_whatever_the_ranks(tmp_path):
    bad = {3, 17, 30}
    manifest = write_data(tmp_path, SIZES, spoil(bad))
    runs = []
    for world, micro in ((1, 16), (4, 2)):
        streams = [open_rank(manifest, rank=r, world=world, micro=micro, max_bad=0.5) for r in range(world)]
        runs.append([torch.cat([b["id"] for b in part]).tolist() for s in streams for part in [next(s.batches(0))]])
        for stream in streams:
            stream.close()
    assert list(itertools.chain(*runs[0])) == list(itertools.chain(*runs[1]))
    stream = open_rank(manifest, max_bad=0.5)
    batches = list(itertools.islice(stream.batches(0), 3))
    delivered = torch.cat([b["id"] for parts in batches for b in parts])
    planned = torch.from_numpy(
        np.concatenate([Order(np.array(manifest.starts), 1, 16, 4, 4, "drop").batch(t, 0, 16).id for t in range(3)])
    )
    differs = delivered != planned
    assert set(planned[differs].tolist()) == bad
    lines = stream.ledger()
    assert {line["id"]: line["substitute"] for line in lines} == dict(
        zip(planned[differs].tolist(), delivered[differs].tolist(), strict=True)
    )
    line = next(line for line in lines if line["id"] == 17)
    assert line["shard"] == f"{tmp_path}/x-000004.tar" and line["key"] == "000017" and line["epoch"] == 0
    assert "not a readable image" in line["reason"] and json.dumps(line)
    assert stream.ledger() == []
    assert not set(delivered.tolist()) & bad


@pytest.mark.parametrize("micro", [16, 2])
def test_the_ledger_is_in_the_order_of_steps_and_batches(tmp_path, micro):
    """However the samples of a micro-batch lie in the shards."""
    bad = set(range(0, 48, 3))
    manifest = write_data(tmp_path, SIZES, spoil(bad))
    stream = open_rank(manifest, micro=micro, max_bad=0.5)
    list(itertools.islice(stream.batches(1), 2))
    order = Order(np.array(manifest.starts), 1, 16, 4, 4, "drop")
    expected = []
    for step, at in itertools.product((1, 2), range(16)):
        if (planned := int(order.batch(step, at, at + 1).id[0])) in bad:
            others = (order.substitute(step, at, attempt) for attempt in itertools.count(1))
            expected.append((step, planned, next(i for i in others if i not in bad)))
    assert [(line["step"], line["id"], line["substitute"]) for line in stream.ledger()] == expected
    assert expected != sorted(expected)
    stream.close()


def test_a_run_of_bad_samples_is_passed_over(tmp_path):
    """The sample after a bad one is as often as not bad, too."""
    bad = set(range(16, 33))
    manifest = write_data(tmp_path, SIZES, spoil(bad))
    stream = open_rank(manifest, max_bad=0.5, lanes=1, window=6)
    delivered = [i for parts in itertools.islice(stream.batches(0), 3) for b in parts for i in b["id"].tolist()]
    assert {line["id"] for line in stream.ledger()} == bad and not bad & set(delivered)
    stream.close()


def test_a_substitute_is_cropped_and_flipped_as_at_its_own_place(tmp_path):
    manifest = write_data(tmp_path, SIZES, spoil(set(range(0, 48, 6))))
    pictures, times = {}, 0
    for batch in steps_of(manifest, 3, 3, max_bad=0.5):
        assert (batch["epoch"] == 1).all()
        for i, picture in zip(batch["id"].tolist(), batch["image"], strict=True):
            times += i in pictures
            assert torch.equal(pictures.setdefault(i, picture), picture)
    assert times == 8


def test_too_many_bad_samples_stop_the_run(tmp_path):
    manifest = write_data(tmp_path, SIZES, spoil(set(range(0, 48, 4))))
    with pytest.raises(DataError, match=r"of .* samples could not be used, more than data.max_bad = 0.1.*x-00000"):
        list(itertools.islice(open_rank(manifest, max_bad=0.1).batches(0), 3))
    # Twelve of the 48 samples of the epoch: a quarter is as much as is allowed.
    assert len(list(itertools.islice(open_rank(manifest, max_bad=0.25).batches(0), 3))) == 3


def test_no_bad_sample_is_allowed_when_none_is(tmp_path):
    manifest = write_data(tmp_path, SIZES, spoil({20}))
    with pytest.raises(DataError, match="'000020'"):
        list(itertools.islice(open_rank(manifest, max_bad=0).batches(0), 3))
