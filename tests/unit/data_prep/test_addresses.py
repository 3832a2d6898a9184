"""Names in addresses, on servers that fail in their own ways, and patterns of names: no name is out of reach."""

import functools
import http.server
import threading

import fsspec
import numpy as np
import pytest

from data_prep.build import build
from data_prep.index import index
from data_prep.options import Options
from data_prep.places import filesystem, listing, opened
from data_prep.sources.folder import FolderSource
from data_prep.sources.tars import TarsSource
from data_prep.verify import verify
from pipeline.config.schema import Cache, Data
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.location import expand, join
from pipeline.core.manifest import load
from pipeline.data.stream import open_stream
from tests.unit.data_prep.samples import members, png, write_tar

NAMES = [
    "plain",
    "sp ace",
    "caf\u00e9",
    "per%20cent",
    "hash#1",
    "q?x=1",
    "plus+1",
    "amp&1",
    "semi;1",
    "part={a}",
    "a,b",
]
CONTENT = {name: data for i in range(4) for name, data in ((f"{i}.png", png(i)), (f"{i}.cls", b"%d" % (i % 2)))}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder, and its address."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def labels(root, tmp_path):
    cache = Cache(folder=str(tmp_path / "cache"), limit_gb=1)
    data = Data(train=root, fields=("label",), workers=0, cache=cache)
    stream = open_stream(data, load(root), seed=0, global_batch=4, micro_batch=4, rank=0, world=1)
    (batch,) = next(stream.batches(0))
    stream.close()
    return np.sort(batch["label"].numpy()).tolist()


def test_any_name_of_a_shard_is_found_on_a_web_server(served):
    """Verified, streamed, listed and repacked."""
    folder, url = served
    (folder / "set").mkdir()
    for i, name in enumerate(NAMES):
        write_tar(folder / f"set/{name}.tar", {f"{i}-{member}": data for member, data in CONTENT.items()})
    index(str(folder / "set"))
    root = f"{url}/set"
    assert not verify(root, decode=1).problems
    assert {f.name for f in listing(root)[0]} >= {f"{name}.tar" for name in NAMES}
    assert build(TarsSource([root]), folder / "out", Options({})).counts.samples == 4 * len(NAMES)
    for name in NAMES[3:6]:
        assert labels(f"{root}/{name}.tar", folder) == [0, 0, 1, 1]


def test_any_name_of_an_image_is_found_on_a_web_server(served):
    folder, url = served
    (folder / "in/a#b?").mkdir(parents=True)
    for i, name in enumerate(NAMES):
        (folder / f"in/a#b?/{name}.png").write_bytes(png(i))
        (folder / f"in/a#b?/{name}.txt").write_text(f"picture {i}")
    built = build(FolderSource(f"{url}/in"), folder / "out", Options({}))
    assert (built.counts.samples, built.counts.rejects) == (len(NAMES), 0)
    found = members(folder / "out/train")
    assert sorted(v for k, v in found.items() if k.endswith(".txt")) == sorted(
        b"picture %d" % i for i in range(len(NAMES))
    )


def test_names_are_quoted_in_addresses_alone():
    assert join("http://x/y/", "a%b/c d") == "http://x/y/a%25b/c%20d"
    assert join("/x/y", "a%b") == "/x/y/a%b" and join("s3://x", "a%b") == "s3://x/a%b"


def test_a_web_server_is_not_written_to(served):
    folder, url = served
    write_tar(folder / "x.tar", CONTENT)
    for work in (lambda: index(url), lambda: build(FolderSource(folder), f"{url}/new", Options({}))):
        (folder / "a.png").write_bytes(png())
        with pytest.raises((OSError, DataError), match="http"):
            work()


class Strange(Exception):
    """As packages of servers have of their own."""


@pytest.mark.parametrize("method", ["ls", "cat_file", "open", "info"])
def test_whatever_a_server_raises_is_a_failure_of_the_system(monkeypatch, method):
    def fail(*arguments, **options):
        raise Strange("the server says 418")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), method, fail)
    with pytest.raises(OSError, match="Strange: the server says 418"):
        getattr(filesystem("memory://x")[0], method)("/x")


def test_failures_while_a_file_is_read(monkeypatch):
    files = fsspec.filesystem("memory")
    files.pipe_file("/broken.csv", b"a,b\n" * 10)

    def fail(self, size=-1):
        raise Strange("connection lost")

    with opened("memory://broken.csv") as f:
        assert f.read(3) == b"a,b" and f.seek(-4, 2) == 36 and f.read() == b"a,b\n"
    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.read", fail)
    with opened("memory://broken.csv") as f, pytest.raises(OSError, match="Strange: connection lost"):
        f.read(1)
    files.rm("/broken.csv")


# -- patterns


@pytest.mark.parametrize(
    "pattern", ["{00..", "00}.tar", "x{1,2", "{0..99999999999}.tar", "{0..999}{0..999}{0..9}", "{" * 3000]
)
def test_patterns_that_stand_for_nothing_or_too_much(tmp_path, pattern):
    with pytest.raises(ConfigError, match="cannot read the shard list") as caught:
        expand(pattern)
    assert len(str(caught.value)) < 500
    for read in (lambda: TarsSource([str(tmp_path / pattern[:100])]), lambda: index(str(tmp_path), pattern=pattern)):
        with pytest.raises(ConfigError, match="cannot read the shard list"):
            read()


@pytest.mark.parametrize("name", ["set{1,2}", "open{brace", "back\\slash", "x.tar", "#hash?q=1", "{0..1}"])
def test_folders_of_any_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    write_tar(folder / f"s{name}.tar".replace(".tar.tar", ".tar"), CONTENT)
    index(str(folder))
    assert not verify(str(folder), decode=1).problems
    assert labels(str(folder), tmp_path) == [0, 0, 1, 1]
    tar = next(folder.glob("*.tar"))
    assert TarsSource([str(tar)]).total == TarsSource([str(folder)]).total == 4
    assert load(str(tar)).samples == 4


def test_tars_to_index_lie_in_the_folder_once(tmp_path):
    """By the names that a manifest can hold; an address of a tar in the folder is one."""
    (tmp_path / "set").mkdir()
    for name in ("00", "01"):
        write_tar(tmp_path / f"set/{name}.tar", {f"{name}-{member}": data for member, data in CONTENT.items()})
    folder = str(tmp_path / "set")
    for pattern in (f"{folder}/{{00..01}}.tar", "./{00..01}.tar", "{00..01}.tar"):
        assert [s.name for s in index(folder, pattern=pattern).shards] == ["00.tar", "01.tar"]
        assert load(folder).samples == 8
    for pattern, words in (
        ("/etc/{a,b}.tar", "below it, not '/etc/a.tar'"),
        ("../set/00.tar", "below it, not '../set/00.tar'"),
    ):
        with pytest.raises(ConfigError, match=words):
            index(folder, pattern=pattern)
    for pattern in ("{00,00}.tar", "{00,./00}.tar"):
        with pytest.raises(ConfigError, match=r"'00\.tar' twice"):
            index(folder, pattern=pattern)
