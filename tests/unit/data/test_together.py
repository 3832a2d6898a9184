"""Data sets side by side in one batch, as adaptation wants them: each with its own exact cursor."""

import itertools

import numpy as np
import pytest
import torch

from pipeline.config.schema import Beside, Data, Image
from pipeline.core.batch import batch_of
from pipeline.core.contract import check_batch
from pipeline.core.digest import batch_digest, data_digest
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.core.manifest import load
from pipeline.data.order import Order
from pipeline.data.stream import _seed_of, open_stream
from tests.unit.data.shards import members, picture, write_data
from tests.unit.data.test_stream import assert_same, spoil

SOURCE, TARGET = [5, 0, 9, 1, 20, 13], [12, 7, 3]
IMAGE = Image(size=8)


def unlabelled(number):
    return {"png": members(number + 500)["png"] if number != 4 else b"<html>"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    write_data(source, SOURCE, spoil({30}))
    write_data(target, TARGET, unlabelled, {"image": ("png",)})
    return str(source), str(target)


def open_pair(folders, *, rank=0, world=1, micro=2, batch=8, image=None, seed=1, ratio=1, **settings):
    source, target = folders
    settings = {"image": IMAGE, "workers": 0, "tail": "endless", "lanes": 4, "max_bad": 1} | settings
    beside = {"target": Beside(path=target, image=image, ratio=ratio)}
    data = Data(train=source, fields=("image", "label"), beside=beside, **settings)
    return open_stream(data, load(source), seed=seed, global_batch=batch, micro_batch=micro, rank=rank, world=world)


def steps_of(folders, first, count, *, world=1, **settings):
    """Global batches, put together from all ranks."""
    parts = []
    for rank in range(world):
        stream = open_pair(folders, rank=rank, world=world, **settings)
        parts.append(list(itertools.islice(stream.batches(first), count)))
        stream.close()
    return [
        {key: torch.cat([micro[key] for part in parts for micro in part[step]]) for key in parts[0][0][0]}
        for step in range(count)
    ]


def test_a_batch_holds_both_under_names_of_their_own(folders):
    needs = {
        "image": "uint8[B,3,8,8]",
        "label": "int64[B]",
        "target_image": "uint8[B,3,6,4]",
        "target_id": "int64[B]",
        "target_epoch": "int64[B]",
    }
    (batch, *_) = next(open_pair(folders, image=Image(size=(6, 4))).batches(0))
    check_batch(needs, batch, "adapt")
    assert set(batch) == {*needs, "id", "epoch"}
    assert (batch["id"] < 48).all() and (batch["target_id"] >= 48).all()
    with pytest.raises(ConfigError, match="'target_label' is not in the batch"):
        check_batch({"target_label": "int64[B]"}, batch, "adapt")


def test_each_has_its_own_exact_cursor(folders):
    """Samples of an epoch come once each, whatever the other data set's size; the bad ones are replaced."""
    batches = steps_of(folders, 0, 18)
    for prefix, base, count, bad in (("", 0, 48, {30}), ("target_", 48, 22, {4})):
        ids, epochs = (torch.cat([b[prefix + name] for b in batches]).numpy() for name in ("id", "epoch"))
        for epoch in range(2):
            mine = ids[epochs == epoch] - base
            assert len(mine) == count
            assert sorted(set(range(count)) - set(mine)) == sorted(bad)
    order = Order(np.array(load(folders[0]).starts), 1, 8, 4, 4, "endless")
    planned = np.concatenate([order.batch(t, 0, 8).id for t in range(6)])
    delivered = torch.cat([b["id"] for b in batches[:6]]).numpy()
    assert (planned != delivered).sum() == 1


def test_target_pictures_are_the_targets(folders):
    """Independently decoded: the red of an upright picture tells its number."""
    batches = steps_of(folders, 0, 4, image=Image(size=(24, 20), crop="resize"))
    for batch in batches:
        for number, image in zip(batch["target_id"].tolist(), batch["target_image"], strict=True):
            assert np.array_equal(image.permute(1, 2, 0).numpy(), picture(number - 48 + 500))


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (8, 0), (1, 1)])
def test_ranks_and_processes_change_nothing(folders, world, workers):
    assert_same(steps_of(folders, 0, 5), steps_of(folders, 0, 5, world=world, micro=1, workers=workers))


def test_resume_at_other_world_sizes(folders):
    """The concatenation over kills equals one undisturbed run, in ids and pixels of both."""
    whole, at, pieces = steps_of(folders, 0, 9), 0, []
    for world, length in ((1, 2), (4, 3), (2, 1), (8, 3)):
        pieces += steps_of(folders, at, length, world=world, micro=1)
        at += length
    assert_same(whole, pieces)


def test_pairs_are_not_the_same_in_every_epoch(tmp_path):
    """Two data sets of the same shape: an order from the same seed would pair sample i with sample i for ever."""
    for name in ("a", "b"):
        write_data(tmp_path / name, [6, 6, 6, 6])
    folders = str(tmp_path / "a"), str(tmp_path / "b")
    pairs = [
        (i, j - 24)
        for batch in steps_of(folders, 0, 6, lanes=1, max_bad=0)
        for i, j in zip(batch["id"].tolist(), batch["target_id"].tolist(), strict=True)
    ]
    assert sum(i == j for i, j in pairs) < 12 and len(set(pairs)) > 36


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 1)])
def test_three_of_the_target_for_each_of_the_source(folders, world, workers):
    """They are those that a batch three times as large would have, shared out as the source's samples are."""
    many = steps_of(folders, 0, 5, ratio=3, world=world, workers=workers)
    alone = steps_of(folders, 0, 5)
    order = Order(np.array(load(folders[1]).starts), _seed_of(1, "target"), 24, 4, 4, "endless")
    for step, batch in enumerate(many):
        assert torch.equal(batch["id"], alone[step]["id"]) and torch.equal(batch["image"], alone[step]["image"])
        assert batch["target_id"].shape == (8, 3) and batch["target_image"].shape == (8, 3, 3, 8, 8)
        target = batch_of(batch, "target")
        drawn = order.batch(step, 0, 24)
        expected = [48 + i for i in drawn.id.tolist()]
        replaced = [a != b for a, b in zip(target["id"].tolist(), expected, strict=True)]
        assert all(i == 52 for i, other in zip(expected, replaced, strict=True) if other)
        assert target["epoch"].tolist() == drawn.epoch.tolist() and target["image"].shape == (24, 3, 8, 8)
    needs = {"image": "uint8[B,3,8,8]", "target_image": "uint8[B,3,8,8]", "target_id": "int64[B]"}
    check_batch(needs, many[0], "fixmatch")
    expected = data_digest(many[0]["id"]) + data_digest(many[0]["target_id"].flatten())
    assert torch.equal(batch_digest(many[0]), expected)


def test_more_of_the_target_resume_and_count(folders):
    whole = steps_of(folders, 0, 6, ratio=2, micro=1)
    assert_same(whole, steps_of(folders, 0, 2, ratio=2, micro=1) + steps_of(folders, 2, 4, ratio=2, micro=1, world=4))
    with pytest.raises(CheckpointError, match=r"target_global_batch: checkpoint 16, now 24"):
        open_pair(folders, ratio=3).check(open_pair(folders, ratio=2).state(3))
    # A 48th of the one and a 22nd of the other, of which there are twice as many: 3.7 %. Of the first's number counted
    # twice it would be 5.6 %.
    stream = open_pair(folders, ratio=2, max_bad=0.05)
    list(itertools.islice(stream.batches(0), 60))
    stream.close()


def test_a_batch_larger_than_the_labelled_part(folders):
    """48 labelled samples, 128 in a batch: each comes about as often as the other, with crops of its own each time."""
    batch = steps_of(folders, 0, 3, batch=128, micro=64)[0]
    count = torch.bincount(batch["id"], minlength=48)
    good = [i for i in range(48) if i != 30]
    assert count[30] == 0 and count[good].min() >= 2 and count.sum() == 128
    twice = (batch["id"] == int(batch["id"][0])).nonzero().flatten()[:2]
    assert not torch.equal(*batch["image"][twice])


def test_decoding_on_the_device_needs_as_many_of_each(folders):
    with pytest.raises(ConfigError, match=r"needs a GPU"):
        open_pair(folders, ratio=2, decode="device")


def test_digest_covers_both(folders):
    batch = steps_of(folders, 0, 1)[0]
    expected = data_digest(batch["id"]) + data_digest(batch["target_id"])
    assert torch.equal(batch_digest(batch), expected)
    changed = batch | {"target_id": batch["target_id"].roll(1).clone()}
    changed["target_id"][0] += 1
    assert not torch.equal(batch_digest(changed), expected)


def test_ledger_and_events_cover_both(folders):
    stream = open_pair(folders)
    list(itertools.islice(stream.batches(0), 6))
    noted = stream.ledger()
    assert stream.events() == {"replaced_samples": len(noted)} and stream.events() == {"replaced_samples": 0}
    lines = {line["id"]: line for line in noted}
    assert set(lines) == {30, 52}
    assert lines[52]["shard"].startswith(folders[1]) and 48 <= lines[52]["substitute"] < 70
    assert lines[30]["shard"].startswith(folders[0]) and lines[30]["substitute"] < 48


def test_samples_of_both_count_where_bad_ones_are_too_many(tmp_path):
    """One bad sample in 48, in both data sets and in every epoch: a fiftieth of all, a 24th of each step's number."""
    for name in ("a", "b"):
        write_data(tmp_path / name, SOURCE, spoil({30}))
    folders = str(tmp_path / "a"), str(tmp_path / "b")
    stream = open_pair(folders, max_bad=0.03, batch=16, micro=16)
    list(itertools.islice(stream.batches(0), 15))
    assert stream.events() == {"replaced_samples": 10}
    stream.close()


def test_state_covers_both(folders, tmp_path):
    state = open_pair(folders).state(3)
    open_pair(folders, rank=1, world=2).check(state)
    write_data(tmp_path, TARGET, lambda n: members(n), {"image": ("png",)})
    with pytest.raises(CheckpointError, match=r"target_manifest: checkpoint"):
        open_pair((folders[0], str(tmp_path))).check(state)
    alone = Data(train=folders[0], fields=("image", "label"), image=IMAGE, workers=0, tail="endless", lanes=4)
    stream = open_stream(alone, load(folders[0]), seed=1, global_batch=8, micro_batch=2, rank=0, world=1)
    with pytest.raises(CheckpointError, match=r"target_manifest: checkpoint .*, now None"):
        stream.check(state)
    with pytest.raises(CheckpointError, match=r"target_manifest: checkpoint None, now"):
        open_pair(folders).check(stream.state(3))


def test_refusals(folders, tmp_path):
    with pytest.raises(DataError, match=r"no manifest at .*nowhere"):
        open_pair((folders[0], str(tmp_path / "nowhere")))
    with pytest.raises(ConfigError, match=r"global_batch = 32 takes 32 samples of .*, which has 22.*endless"):
        open_pair(folders, batch=32, tail="drop")
    with pytest.raises(ConfigError, match=r"data.lanes = 32 is more than the 22 samples of"):
        open_pair(folders, batch=32, lanes=32)
    with pytest.raises(ValueError, match="beside"):
        Data(train="x", beside={"My target": Beside(path="y")})
