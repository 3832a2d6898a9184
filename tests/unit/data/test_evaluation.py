"""The evaluation stream: each sample once, in order, without padding."""

import itertools
import os

import pytest
import torch

from pipeline.config.schema import Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.data.evaluation import Part, open_eval
from tests.unit.data.shards import write_data
from tests.unit.data.test_stream import spoil

IMAGE = Image(size=8, crop="center")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), [5, 0, 9, 1, 4]).root


def ranks(folder, world, *, batch=4, workers=0):
    return [
        open_eval(folder, IMAGE, ("image", "label"), batch=batch, workers=workers, part=Part(rank, world))
        for rank in range(world)
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 8, 25])
def test_each_sample_once_in_order(folder, world):
    streams = ranks(folder, world)
    batches = list(itertools.chain(*streams))
    whole = list(ranks(folder, 1)[0])
    for key in ("id", "label", "image"):
        assert torch.equal(torch.cat([b[key] for b in batches]), torch.cat([b[key] for b in whole]))
    assert torch.cat([b["id"] for b in batches]).tolist() == list(range(19))
    assert torch.equal(whole[0]["label"], torch.arange(4))
    assert streams[0].samples == 19 and streams[0].classes[1] == "c1"


def test_twice_and_with_workers(folder):
    (plain,), (stream,) = ranks(folder, 1), ranks(folder, 1, workers=2)
    for _ in range(2):
        for a, b in itertools.zip_longest(plain, stream):
            assert all(torch.equal(a[key], b[key]) for key in a)
    stream.close()
    stream.close()


def test_bad_sample_is_an_error(tmp_path):
    write_data(tmp_path, [6], spoil({4}))
    with pytest.raises(
        DataError, match=r"x-000000\.tar, sample '000004': field 'image': not a readable image \(.*format\)$"
    ):
        list(ranks(tmp_path, 1)[0])


def test_a_shard_that_is_gone_or_cut_is_noticed_before_the_first_batch(tmp_path):
    manifest = write_data(tmp_path, [5, 9])
    os.truncate(tmp_path / "x-000001.tar", 1024)
    with pytest.raises(DataError, match=r"x-000001\.tar has 1024 bytes"):
        ranks(manifest.root, 2)
    os.unlink(tmp_path / "x-000000.tar")
    with pytest.raises(DataError, match=r"cannot open shard .*x-000000\.tar"):
        ranks(manifest.root, 1)


def test_refusals(folder, tmp_path):
    with pytest.raises(DataError, match="no manifest"):
        ranks(tmp_path / "nowhere", 1)
    with pytest.raises(ConfigError, match="has no field 'caption', only image, label"):
        open_eval(folder, IMAGE, ("text",), batch=4, workers=0)
