"""Sources mixed by weight: shares, exactness of each source's own cursor, independence of ranks."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.config.schema import Data, Image, Source
from pipeline.core.errors import CheckpointError, ConfigError
from pipeline.core.manifest import load, save
from pipeline.data.mixture import Mixture, shares
from pipeline.data.order import Order
from pipeline.data.reading import TrainReading
from pipeline.data.stream import open_stream
from tests.unit.data.shards import members, write_data
from tests.unit.data.test_stream import spoil

IMAGE = Image(size=8, crop="resize")


@pytest.mark.parametrize(
    ("batch", "weights", "expected"),
    [
        (8, [1, 1], [4, 4]),
        (10, [3, 1], [8, 2]),
        (7, [1, 1, 1], [3, 2, 2]),
        (10, [62, 38], [6, 4]),
        (100, [0.5, 0.25, 0.25], [50, 25, 25]),
        (3, [5], [3]),
    ],
)
def test_shares(batch, weights, expected):
    assert shares(batch, weights) == expected


def test_a_source_without_a_share_is_refused():
    with pytest.raises(ConfigError, match=r"data\.train\[1\]: of a global batch of 8, its weight leaves it no sample"):
        shares(8, [100, 1])


def mixture(sizes=((5, 7, 9), (4, 4)), parts=(9, 3)):
    return Mixture(
        tuple(Order(np.cumsum([0, *s]), 1, share, 3, 2, "endless") for s, share in zip(sizes, parts, strict=True))
    )


def test_each_source_has_its_own_exact_cursor():
    subject = mixture()
    steps = 21
    places = [subject.batch(t, 0, 12) for t in range(steps)]
    epochs, ids = (np.concatenate(x) for x in zip(*places, strict=True))
    for base, order in zip((0, 21), subject.orders, strict=True):
        mine = (ids >= base) & (ids < base + order.samples)
        expected = [order.batch(t, 0, order.global_batch) for t in range(steps)]
        assert sorted(zip(epochs[mine], ids[mine] - base, strict=True)) == sorted(
            pair for p in expected for pair in zip(p.epoch, p.id, strict=True)
        )
        for epoch in range(2):
            assert sorted(ids[mine & (epochs == epoch)] - base) == list(range(order.samples))


def test_sources_are_spread_evenly_over_ranks():
    subject = mixture(((64,), (64,)), (36, 12))
    for world in (2, 4, 12):
        for rank in range(world):
            ids = TrainReading(subject, 48 // world, rank, world).draw(5).id
            assert (ids >= 64).sum() == 12 // world


def test_substitutes_come_from_the_same_source():
    subject = mixture()
    for index in range(12):
        bad = subject.batch(0, index, index + 1).id[0]
        other = subject.substitute(0, index, 1)
        assert other is not None and other != bad and (other >= 21) == (bad >= 21)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    a, b = tmp_path_factory.mktemp("a"), tmp_path_factory.mktemp("b")
    write_data(a, [5, 7, 9])
    write_data(b, [4, 4], lambda n: members(n + 100))
    return str(a), str(b)


def open_mixed(folders, *, weights=(3, 1), rank=0, world=1, micro=2, **settings):
    sources = tuple(Source(path=p, weight=w) for p, w in zip(folders, weights, strict=True))
    data = Data(
        train=sources, **({"fields": ("image", "label"), "image": IMAGE, "workers": 0, "tail": "endless"} | settings)
    )
    return open_stream(data, load(data.train), seed=1, global_batch=8, micro_batch=micro, rank=rank, world=world)


def first(stream, steps):
    return [
        {k: torch.cat([m[k] for m in parts]) for k in parts[0]} for parts in itertools.islice(stream.batches(0), steps)
    ]


def test_stream_of_two_sources(folders):
    batches = first(open_mixed(folders), 8)
    pictures = {}
    for batch in batches:
        ids = batch["id"]
        assert (ids < 21).sum() == 6 and (ids >= 21).sum() == 2
        assert torch.equal(batch["label"], torch.where(ids < 21, ids, ids - 21 + 100) % 7)
        for i, p in zip(ids.tolist(), batch["image"], strict=True):
            assert torch.equal(pictures.setdefault(i, p), p)
    assert len(pictures) == 29
    ranks = [first(open_mixed(folders, rank=r, world=2), 8) for r in range(2)]
    for whole, *parts in zip(batches, *ranks, strict=True):
        assert torch.equal(whole["id"], torch.cat([p["id"] for p in parts]))


def test_a_bad_sample_of_any_source_is_named(folders, tmp_path):
    write_data(tmp_path, [4, 4], spoil({6}))
    stream = open_mixed((folders[0], str(tmp_path)), max_bad=0.5)
    first(stream, 4)
    (line,) = stream.ledger()
    assert line["shard"] == f"{tmp_path}/x-000001.tar" and line["key"] == "000006"
    assert line["id"] == 21 + 6 and 21 <= line["substitute"] < 29


def test_state_of_a_mixture(folders):
    state = open_mixed(folders).state(3)
    open_mixed(folders, rank=1, world=2).check(state)
    with pytest.raises(CheckpointError, match="sources"):
        open_mixed(folders, weights=(1, 1)).check(state)
    with pytest.raises(CheckpointError, match="manifest"):
        open_mixed(folders[::-1], weights=(3, 1)).check(state)


def test_state_of_a_mixture_tells_every_share(folders):
    """Here the first source's stays as it is."""
    three = (folders[0], folders[1], folders[1])
    state = open_mixed(three, weights=(4, 3, 1)).state(3)
    open_mixed(three, weights=(4, 3, 1)).check(state)
    with pytest.raises(CheckpointError, match="sources"):
        open_mixed(three, weights=(4, 1, 3)).check(state)


def test_some_shards_of_a_folder(folders):
    some = load(f"{folders[0]}/x-{{000001..000002}}.tar")
    assert [s.name for s in some.shards] == ["x-000001.tar", "x-000002.tar"] and some.samples == 16
    data = Data(train=f"{folders[0]}/x-{{000001..000002}}.tar", fields=("label",), workers=0)
    stream = open_stream(data, some, seed=1, global_batch=16, micro_batch=16, rank=0, world=1)
    (batch,) = next(stream.batches(0))
    assert sorted(batch["id"].tolist()) == list(range(16))
    assert torch.equal(batch["label"], (batch["id"] + 5) % 7)


def test_labels_of_different_classes_are_refused(folders, tmp_path):

    other = replace(write_data(tmp_path, [8]), classes=("cat", "dog"))
    save(other, tmp_path)
    with pytest.raises(ConfigError, match="labels of sources with different classes"):
        open_mixed((folders[0], str(tmp_path)))
    open_mixed((folders[0], str(tmp_path)), fields=("image",))
