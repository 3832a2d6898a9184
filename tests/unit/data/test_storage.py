"""Shards at URLs, by ranges and through the cache; servers that keep failing are in test_damage.py."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import fsspec
import pytest
import torch

from pipeline.config.schema import Cache, Data, Image
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from pipeline.data import storage
from pipeline.data.access import check_shard
from pipeline.data.assemble import Assembler
from pipeline.data.cache import Cached
from pipeline.data.reading import EvalReading
from pipeline.data.storage import Local, Ranges, Remote, patiently
from pipeline.data.stream import assemble_here, open_stream
from pipeline.data.workers import Workers
from tests.unit.data.shards import write_data

SIZES = [5, 9, 20, 13]


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), SIZES)


def open_at(url, **settings):
    data = Data(train=url, **({"fields": ("image", "label"), "image": Image(size=8), "workers": 0} | settings))
    return open_stream(data, load(url), seed=1, global_batch=16, micro_batch=8, rank=0, world=1)


def first(stream, steps):
    found = [m for parts in itertools.islice(stream.batches(0), steps) for m in parts]
    stream.close()
    return found


def assert_same(left, right):
    assert all(torch.equal(a[key], b[key]) for a, b in zip(left, right, strict=True) for key in a)


def test_same_batches_over_http(local, server):
    assert_same(first(open_at(local.root), 4), first(open_at(server.url), 4))
    tars = [wanted for name, wanted in server.asked if name.endswith(".tar")]
    assert tars and None not in tars, "a whole shard was read for a few samples"


def test_loader_processes_over_http(local, server):
    assert_same(first(open_at(local.root), 4), first(open_at(server.url, workers=2), 4))


def test_loader_processes_fetch_early_what_they_make_themselves(local, server):
    """So no part of a shard is fetched twice in a pass."""
    data = Data(train=server.url, fields=("label",))
    workers = Workers(Assembler(load(server.url), data, 0, EvalReading(0, 47, 8)), 2)
    assert sum(made.filled.samples for made in workers.batches(0)) == 47
    workers.close()
    tars = [asked for asked in server.asked if asked[0].endswith(".tar")]
    assert len(set(tars)) == len(tars) >= 6


def test_the_next_micro_batch_is_fetched_while_one_is_made(local, server):
    """The server goes away after the first one, and the second comes all the same."""
    stream = open_at(server.url)
    made = assemble_here(stream._filler, 0)
    expected = assemble_here(open_at(local.root)._filler, 0)
    assert_same([next(expected).batch], [next(made).batch])
    ahead = stream._filler._readers[0]._storage._next.values()
    assert ahead and not wait(ahead, 20).not_done
    server.faults = {s.name: "missing" for s in local.shards}
    assert_same([next(expected).batch], [next(made).batch])
    with pytest.raises(DataError, match="cannot open shard"):
        next(made)


def test_what_was_expected_in_vain_is_forgotten(local, server):
    """A stream that starts elsewhere neither waits for it nor keeps it."""
    storage_of, wanted = Remote(server.url), [Ranges(s, [0], [512]) for s in local.shards]
    for _ in range(3):
        storage_of.expect(wanted[:1])
    storage_of.expect(wanted[1:2])
    storage_of.expect(wanted[2:3])
    assert [name for name, *_ in (*storage_of._now, *storage_of._next)] == [s.name for s in local.shards[1:3]]
    into = memoryview(bytearray(512))
    for ranges in wanted:
        storage_of.read(ranges, into)
        assert bytes(into) == (Path(local.root) / ranges.shard.name).read_bytes()[:512]
    assert not storage_of._now and not storage_of._next
    storage_of.close()


def test_only_the_very_bytes_that_were_expected_are_taken(local, server):
    storage_of, shard = Remote(server.url), local.shards[0]
    content = (Path(local.root) / shard.name).read_bytes()
    for (first_, last_), (start, stop) in (((0, 512), (0, 1024)), ((0, 1024), (512, 1024))):
        storage_of.expect([Ranges(shard, [first_], [last_])])
        into = memoryview(bytearray(stop - start))
        storage_of.read(Ranges(shard, [start], [stop]), into)
        assert bytes(into) == content[start:stop]
    storage_of.close()


def test_pauses_between_attempts_grow(monkeypatch):
    pauses = []
    monkeypatch.setattr(storage.time, "sleep", pauses.append)
    with pytest.raises(DataError, match=r"cannot read x \(ZeroDivisionError: .*\), tried 3 times"):
        patiently("x", lambda: 1 / 0)
    assert pauses == [1, 2]


def test_a_server_that_says_no_length_is_trusted_until_bytes_are_missing(local, server):
    server.faults = {s.name: "no length" for s in local.shards}
    assert_same(first(open_at(local.root), 2), first(open_at(server.url), 2))


def test_any_fsspec_url(local):
    files = fsspec.filesystem("memory")
    files.put(local.root + "/", "/bucket/data", recursive=True)
    assert_same(first(open_at(local.root), 4), first(open_at("memory://bucket/data"), 4))
    files.rm("/bucket", recursive=True)


def test_cache_holds_whole_shards_and_is_used_again(local, server, tmp_path):
    cache = Cache(folder=str(tmp_path), limit_gb=1)
    assert_same(first(open_at(local.root), 8), first(open_at(server.url, cache=cache), 8))
    folder = tmp_path / local.fingerprint
    kept = sorted(p.name for p in folder.glob("[!.]*"))
    assert kept == [s.name for s in local.shards]
    assert all((folder / name).read_bytes() == (Path(local.root) / name).read_bytes() for name in kept)
    server.asked.clear()
    first(open_at(server.url, cache=cache), 8)
    assert not [name for name, _ in server.asked if name.endswith(".tar")]


def test_cache_stays_below_its_limit(local, server, tmp_path):
    limit = max(s.bytes for s in local.shards)
    found = first(open_at(server.url, cache=Cache(folder=str(tmp_path), limit_gb=limit / 1e9)), 8)
    assert_same(first(open_at(local.root), 8), found)
    assert sum(p.stat().st_size for p in (tmp_path / local.fingerprint).glob("[!.]*")) <= limit


def test_what_a_killed_process_left_in_the_cache_is_removed(local, server, tmp_path):
    (tmp_path / ".x-000009.tar.part").write_bytes(bytes(2 * max(s.bytes for s in local.shards)))
    cached = Cached(server.url, str(tmp_path), 2 * max(s.bytes for s in local.shards))
    for shard in local.shards:
        cached.read(Ranges(shard, [0], [512]), memoryview(bytearray(512)))
    assert not list(tmp_path.glob(".*.part"))
    cached.close()


def test_cache_smaller_than_a_shard_is_refused(server, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.cache\.limit_gb = 1e-06 is less than a shard"):
        open_at(server.url, cache=Cache(folder=str(tmp_path), limit_gb=1e-6))


def test_a_shard_is_fetched_once_for_all_who_want_it(local, server, tmp_path):
    """Eight threads with eight caches over the same folder, as the ranks of a node have."""
    caches = [Cached(server.url, str(tmp_path), 10**9) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda c: [c.read(Ranges(s, [0], [512]), memoryview(bytearray(512))) for s in local.shards], caches
            )
        )
    whole = [name for name, wanted in server.asked if wanted is None or wanted.startswith("bytes=0-")]
    assert sorted(whole) == [s.name for s in local.shards]
    assert not list(tmp_path.glob(".*.part"))


def test_prefetch_brings_shards_before_they_are_read(local, server, tmp_path):
    cached = Cached(server.url, str(tmp_path), 10**9)
    cached.prefetch(local.shards[:2])
    cached._ahead.shutdown()
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == [s.name for s in local.shards[:2]]


@pytest.mark.parametrize("kept", [True, False], ids=["cache", "ranges"])
def test_a_server_that_fails_now_and_then_does_no_harm(local, server, tmp_path, kept):
    server.faults = {s.name: 2 for s in local.shards}
    cache = Cache(folder=str(tmp_path), limit_gb=1) if kept else None
    assert_same(first(open_at(local.root), 4), first(open_at(server.url, cache=cache), 4))


def test_a_server_without_ranges_needs_the_cache(local, server, tmp_path):
    server.faults = {s.name: "no ranges" for s in local.shards}
    with pytest.raises(DataError, match=r"does not serve ranges and needs data\.cache"):
        first(open_at(server.url), 1)
    cache = Cache(folder=str(tmp_path), limit_gb=1)
    assert_same(first(open_at(local.root), 4), first(open_at(server.url, cache=cache), 4))


def test_changed_content_of_the_same_size_never_enters_the_cache(local, server, tmp_path):
    other = tmp_path / "other"
    os.makedirs(other)
    for name in os.listdir(local.root):
        with open(f"{local.root}/{name}", "rb") as f:
            content = bytearray(f.read())
        if name == "x-000002.tar":
            content[5000] ^= 1
        (other / name).write_bytes(content)
    server.folder = str(other)
    with pytest.raises(
        DataError, match=r"x-000002\.tar \(DataError: its sha256 is not the manifest's\), tried 3 times"
    ):
        first(open_at(server.url, cache=Cache(folder=str(tmp_path / "cache"), limit_gb=1)), 8)
    assert not (tmp_path / "cache" / local.fingerprint / "x-000002.tar").exists()


def test_missing_manifest_and_unknown_scheme(server):
    server.faults = {"manifest.json": "missing"}
    with pytest.raises(DataError, match=r"no manifest at http://.*/data/manifest\.json"):
        load(server.url)
    with pytest.raises(ConfigError, match="cannot read nothing://x"):
        load("nothing://x")


def test_shard_that_shrinks_on_its_server(local, server, tmp_path):
    shard = local.shards[2]
    (tmp_path / shard.name).write_bytes((Path(local.root) / shard.name).read_bytes()[:1024])
    server.folder = str(tmp_path)
    reader = Remote(server.url)
    with pytest.raises(DataError, match=r"x-000002\.tar .*asked for 4096 bytes at 0, got 1024: the file is cut"):
        reader.read(Ranges(shard, [0], [4096]), memoryview(bytearray(4096)))
    reader.close()


def test_shard_that_shrinks_while_it_is_read(local, tmp_path):
    copy = write_data(tmp_path, SIZES)
    reader, shard = Local(copy.root), copy.shards[2]
    reader.read(Ranges(shard, [0], [512]), memoryview(bytearray(512)))
    os.truncate(f"{copy.root}/{shard.name}", 1024)
    with pytest.raises(DataError, match=r"x-000002\.tar has 1024 bytes, its manifest says"):
        reader.read(Ranges(shard, [0], [4096]), memoryview(bytearray(4096)))
    with pytest.raises(DataError, match=r"x-000002\.tar has 1024 bytes"):
        check_shard(copy, shard)
    reader.close()
