"""The folder of whole shards that the processes of a node share: what it removes, waits for and fetches again."""

import os
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest

from pipeline.config.schema import Cache, Data
from pipeline.core.manifest import load
from pipeline.data.assemble import Assembler
from pipeline.data.cache import Cached
from pipeline.data.reading import EvalReading
from pipeline.data.storage import Local, Ranges
from pipeline.data.stream import assemble_here
from tests.unit.data.shards import write_data


def alike(number):
    """All shards have the same size, so that nothing but their use can decide which is removed."""
    return {"cls": b"%d" % (number % 7), "png": bytes(700)}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"), [50, 50, 50, 50], alike)


def use(cached, shard):
    """The first bytes of a shard."""
    into = bytearray(512)
    cached.read(Ranges(shard, [0], [512]), memoryview(into))
    return bytes(into)


def kept(folder):
    return sorted(p.name for p in folder.glob("[!.]*"))


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_longest_unused_shard_makes_room(local, server, tmp_path):
    shards = local.shards
    cached = Cached(server.url, str(tmp_path), 3 * shards[0].bytes)
    for age, shard in enumerate(shards[:3]):
        use(cached, shard)
        os.utime(tmp_path / shard.name, (age, age))
    use(cached, shards[0])
    use(cached, shards[3])
    assert kept(tmp_path) == [shards[i].name for i in (0, 2, 3)]
    cached.close()


def test_shards_on_their_way_count_for_the_limit(local, server, tmp_path):
    """There is room for one. A second process waits while the first one's is on its way, however little has come."""
    caches = [Cached(server.url, str(tmp_path), local.shards[0].bytes) for _ in range(2)]
    server.faults = {local.shards[0].name: "silent"}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(use, caches[0], local.shards[0])
        until(lambda: any(name == local.shards[0].name for name, _ in server.asked))
        second = pool.submit(use, caches[1], local.shards[1])
        # Long enough for one that does not wait to be done; one that does loses nothing.
        wait([second], 0.5)
        server.released.set()
        first.result(60), second.result(60)
    assert len(kept(tmp_path)) == 1
    for cached in caches:
        cached.close()


def test_a_shard_that_made_room_before_it_was_opened_is_fetched_again(local, server, tmp_path, monkeypatch):
    removed, read = [], Local.read

    def late(self, ranges, into):
        if not removed:
            removed.append(ranges.shard.name)
            os.unlink(tmp_path / ranges.shard.name)
        read(self, ranges, into)

    monkeypatch.setattr(Local, "read", late)
    cached = Cached(server.url, str(tmp_path), 10**9)
    assert use(cached, local.shards[1]) == (Path(local.root) / local.shards[1].name).read_bytes()[:512]
    assert removed == kept(tmp_path) == [local.shards[1].name]
    cached.close()


def test_a_copy_that_a_crash_of_the_node_cut_is_fetched_again(local, server, tmp_path):
    """Files that were not yet on the disk can come back empty; their names are."""
    (tmp_path / local.shards[2].name).touch()
    cached = Cached(server.url, str(tmp_path), 10**9)
    assert use(cached, local.shards[2]) == (Path(local.root) / local.shards[2].name).read_bytes()[:512]
    cached.close()


def test_shards_come_long_before_their_turn(local, server, tmp_path):
    """The first micro-batch of one sample asks for the shard of the sixty-fourth after it."""
    data = Data(train=server.url, fields=("label",), cache=Cache(folder=str(tmp_path), limit_gb=1))
    assembler = Assembler(load(server.url), data, 0, EvalReading(0, 200, 1))
    assert next(assemble_here(assembler, 0)).batch["id"].tolist() == [0]
    until(lambda: kept(tmp_path / local.fingerprint) == [s.name for s in local.shards[:2]])
    assembler.close()
