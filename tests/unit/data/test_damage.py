"""Every kind of damage that readers of tars meet: it ends in the ledger or in an error that names shard and member.

Never in silence, a hang, or another order of the other samples. webdataset and tarfile deliver half of the first four
tars without a word.
"""

import itertools
import os
import tarfile
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch

from pipeline.config.schema import Cache, Data, Image
from pipeline.core import location
from pipeline.core.errors import DataError
from pipeline.core.manifest import load
from pipeline.data.assemble import Assembler
from pipeline.data.order import Order
from pipeline.data.reading import EvalReading
from pipeline.data.stream import assemble_here, open_stream
from tests.unit.data.shards import write_data

SIZES = [5, 9, 20, 14]
BAD_SHARD, BAD_KEY, BAD_ID = "x-000002.tar", "000018", 18
"""What is damaged: shard 2 holds the samples 14 to 33."""


def place(path: str, name: str) -> int:
    """Where the header of a member begins."""
    with tarfile.open(path) as tar:
        return next(m.offset for m in tar if m.name == name)


def patch(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        f.write(content)


def flip_bit(path: str, offset: int) -> None:
    with open(path, "rb") as f:
        f.seek(offset)
        byte = f.read(1)[0]
    patch(path, offset, bytes([byte ^ 4]))


def page(path: str, size: int) -> None:
    with open(path, "wb") as f:
        f.write(b"<!DOCTYPE html><html>please log in</html>".ljust(size))


IMAGE = f"{BAD_KEY}.png"
STOPS: dict[str, tuple[Callable[[str], object], str]] = {
    "cut at a member boundary": (lambda p: os.truncate(p, place(p, IMAGE)), "it was cut or changed"),
    "cut inside a header": (lambda p: os.truncate(p, place(p, IMAGE) + 100), "it was cut or changed"),
    "cut inside data": (lambda p: os.truncate(p, place(p, IMAGE) + 700), "it was cut or changed"),
    "longer": (lambda p: patch(p, os.path.getsize(p), bytes(512)), "it was cut or changed"),
    "empty": (lambda p: os.truncate(p, 0), "has 0 bytes, its manifest says"),
    "page": (lambda p: page(p, 0), "has 41 bytes, its manifest says"),
    "missing": (os.unlink, "cannot open shard .*No such file"),
    "no index": (lambda p: os.unlink(p[:-4] + ".idx"), "no index at .*renew it with `sluice prep index`"),
    "cut index": (lambda p: os.truncate(p[:-4] + ".idx", 100), "x-000002.idx is damaged"),
}
REPLACED: dict[str, tuple[Callable[[str], object], str]] = {
    "bad checksum": (lambda p: patch(p, place(p, IMAGE) + 148, b"0000000\0"), "wrong checksum"),
    "header overwritten": (lambda p: patch(p, place(p, IMAGE), b"<!DOCTYPE html>"), "wrong checksum"),
    "one bit of a header": (lambda p: flip_bit(p, place(p, IMAGE) + 300), "wrong checksum"),
    "zeroed block, header": (lambda p: patch(p, place(p, IMAGE), bytes(512)), "no tar header before its data"),
    "zeroed block, data": (lambda p: patch(p, place(p, IMAGE) + 512, bytes(512)), "wrong CRC-32"),
    "bit rot in an image": (lambda p: flip_bit(p, place(p, IMAGE) + 612), "wrong CRC-32"),
    "bit rot in a label": (lambda p: flip_bit(p, place(p, f"{BAD_KEY}.cls") + 512), "'label' is not what was indexed"),
}


def open_at(root: str, rank: int = 0, world: int = 1, **settings):
    settings = {"fields": ("image", "label"), "image": Image(size=8), "workers": 0, "max_bad": 0.1} | settings
    data = Data(train=root, **settings)
    return open_stream(data, load(root), seed=1, global_batch=16, micro_batch=16 // world, rank=rank, world=world)


def epoch_of(root: str, **settings):
    """Ids of an epoch, and the ledger."""
    with closing(open_at(root, **settings)) as stream:
        ids = torch.cat([m["id"] for parts in itertools.islice(stream.batches(0), 3) for m in parts])
        return ids.numpy(), stream.ledger()


@pytest.mark.parametrize("name", STOPS)
def test_a_shard_that_is_not_the_promised_one_stops_the_run(tmp_path, name):
    manifest = write_data(tmp_path, SIZES)
    spoil, reason = STOPS[name]
    spoil(str(tmp_path / BAD_SHARD))
    with pytest.raises(DataError, match=reason) as found:
        epoch_of(manifest.root, max_bad=1)
    assert "x-000002" in str(found.value)
    # One rank looks at each shard before the first step.
    if "index" not in name:
        with pytest.raises(DataError, match=r"x-000002\.tar"):
            [open_at(manifest.root, rank, 2) for rank in range(2)]


@pytest.mark.parametrize("world", [1, 2, 8])
def test_each_shard_is_looked_at_by_one_rank_before_the_first_step(tmp_path, world):
    """Also where there are more ranks than shards."""
    manifest = write_data(tmp_path, SIZES)
    for shard in manifest.shards:
        os.rename(tmp_path / shard.name, tmp_path / "away")
        noticed = 0
        for rank in range(world):
            try:
                open_at(manifest.root, rank, world).close()
            except DataError as error:
                noticed += shard.name in str(error)
        assert noticed == 1
        os.rename(tmp_path / "away", tmp_path / shard.name)


@pytest.mark.parametrize("name", ["missing", "no index"])
def test_all_that_comes_before_a_lost_shard_is_delivered(tmp_path, name):
    """Its bytes are asked for early, but nothing is said of it before its turn."""
    manifest = write_data(tmp_path, SIZES)
    STOPS[name][0](str(tmp_path / BAD_SHARD))
    data = Data(train=manifest.root, fields=("label",))
    made = assemble_here(Assembler(manifest, data, 0, EvalReading(0, 48, 7)), 0)
    assert [next(made).batch["id"].tolist() for _ in range(2)] == [list(range(7)), list(range(7, 14))]
    with pytest.raises(DataError, match="x-000002"):
        next(made)


@pytest.mark.parametrize("name", REPLACED)
def test_a_damaged_sample_is_replaced_and_noted(tmp_path, name):
    manifest = write_data(tmp_path, SIZES)
    spoil, reason = REPLACED[name]
    spoil(str(tmp_path / BAD_SHARD))
    ids, lines = epoch_of(manifest.root)
    assert len(lines) == 1 and lines[0]["id"] == BAD_ID and lines[0]["key"] == BAD_KEY
    assert lines[0]["shard"] == str(tmp_path / BAD_SHARD) and reason in lines[0]["reason"]
    order = Order(np.array(manifest.starts), 1, 16, 4, 4, "drop")
    planned = np.concatenate([order.batch(step, 0, 16).id for step in range(3)])
    assert planned[ids != planned].tolist() == [BAD_ID]
    assert ids[ids != planned].tolist() == [lines[0]["substitute"]]
    with pytest.raises(DataError, match=rf"1 of .* could not be used.*{BAD_SHARD}, sample '{BAD_KEY}': .*{reason}"):
        epoch_of(manifest.root, max_bad=0)


def test_a_page_of_the_right_size_stops_the_run_above_the_threshold(tmp_path):
    """All samples of the shard are bad, and there are too many of them."""
    manifest = write_data(tmp_path, SIZES)
    page(str(tmp_path / BAD_SHARD), manifest.shards[2].bytes)
    with pytest.raises(DataError, match=r"x-000002\.tar, sample '0000.*': (a tar header|it has no tar header)"):
        epoch_of(manifest.root)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), SIZES)


@pytest.mark.parametrize("kept", [True, False], ids=["cache", "ranges"])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("missing", r"cannot open shard .*x-000002\.tar"),
        ("page", r"x-000002\.tar has 41 bytes, its manifest says"),
        ("broken", r"cannot read .*x-000002\.tar \(.*\), tried 3 times"),
        ("silent", r"cannot read .*x-000002\.tar \(.*\), tried 3 times"),
        (99, r"cannot read .*x-000002\.tar \(.*503.*\), tried 3 times"),
    ],
)
def test_a_server_that_keeps_failing_is_an_error_naming_the_shard(server, tmp_path, monkeypatch, fault, reason, kept):
    if fault == "silent":
        monkeypatch.setattr(location, "SILENCE", 0.3)
    server.faults = {BAD_SHARD: fault}
    cache = Cache(folder=str(tmp_path), limit_gb=1) if kept else None
    with pytest.raises(DataError, match=reason):
        epoch_of(server.url, cache=cache)
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("kept", [True, False], ids=["cache", "ranges"])
def test_a_slow_server_is_waited_for(local, server, tmp_path, kept):
    """As long as bytes come."""
    server.faults = {BAD_SHARD: "slow"}
    cache = Cache(folder=str(tmp_path), limit_gb=1) if kept else None
    assert epoch_of(server.url, cache=cache)[0].tolist() == epoch_of(local.root)[0].tolist()


def test_a_field_name_that_no_sample_has_is_an_error_naming_those_found(tmp_path):
    """At once, before anything is read; and where the manifest has it and the tars do not, in the first batch."""
    manifest = write_data(tmp_path / "a", SIZES, lambda n: {"cls": b"1"}, {"image": ("png",), "label": ("cls",)})
    with pytest.raises(DataError, match=r"no field 'image', only label; none of the \d+ samples after it"):
        epoch_of(manifest.root, max_bad=1)
