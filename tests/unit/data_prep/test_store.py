"""Writing to fsspec targets gives the same files as to a folder."""

from dataclasses import replace

import fsspec
import pytest

from data_prep.build import build
from data_prep.index import index
from data_prep.merge import merge
from data_prep.options import Options
from data_prep.places import tars
from data_prep.sources.folder import FolderSource
from data_prep.sources.table import Columns, TableSource
from data_prep.sources.tars import TarsSource
from data_prep.store import open_store
from data_prep.verify import verify
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load, load_index
from tests.unit.data_prep.samples import ListSource, inline, members, png, tree
from tests.unit.data_prep.test_build import Killed, _dying, _stop_after, lines
from tests.unit.data_prep.test_folder import write
from tests.unit.data_prep.test_scan import _tar
from tests.unit.data_prep.test_table import write as write_table
from tests.unit.data_prep.test_verbs import run


def remote_tree(name):
    fs = fsspec.filesystem("memory")
    return {path.removeprefix(f"/{name}/"): fs.cat_file(path) for path in fs.find(f"/{name}")}


OPTIONS = Options({"val": 0.3}, shard_samples=3)


def source():
    return ListSource([replace(r, caption="x") for r in inline(12)])


def test_fsspec_target(tmp_path):
    build(source(), tmp_path / "local", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        build(source(), "memory://remote", OPTIONS, progress=_stop_after(9))
    assert any(name.startswith(".build/") for name in remote_tree("remote"))
    build(source(), "memory://remote", OPTIONS)
    assert remote_tree("remote") == tree(tmp_path / "local")
    assert verify("memory://remote/train", decode=1).problems == {}
    before = remote_tree("remote")["train/manifest.json"]
    assert index("memory://remote/train").fingerprint in before.decode()
    build(replace(source(), name="more", records=inline(20)[12:]), "memory://remote", OPTIONS, append=True)
    assert verify("memory://remote/train").problems == {}


@pytest.fixture
def memory():
    """A folder of fsspec's memory, and writing into it."""
    fs = fsspec.filesystem("memory")
    fs.rm("/src", recursive=True) if fs.exists("/src") else None

    def write(files):
        for name, content in files.items():
            fs.pipe_file(f"/src/{name}", content if isinstance(content, bytes) else content.encode())
        return "memory://src"

    return write


def same(one, other):
    """Two builds hold the same members under the same names."""
    assert members(one / "train") == members(other / "train") != {}


def test_folders_behind_urls(tmp_path, memory):
    files = {f"{c}/{i}.png": png(i) for c in "ab" for i in range(4)}
    files |= {"a/1.txt": "one", "b/2.json": '{"n": 2}', "b/.hidden.png": png(), ".more/x.png": png(), "b/bad.jpg": b"x"}
    write(tmp_path / "in", files)
    url = memory(files)
    here = build(FolderSource(tmp_path / "in"), tmp_path / "here", Options({}))
    there = build(FolderSource(url), tmp_path / "there", Options({}, workers=0))
    assert here.manifests["train"].fingerprint == there.manifests["train"].fingerprint
    same(tmp_path / "here", tmp_path / "there")
    assert lines(tmp_path / "here/rejects.jsonl") == lines(tmp_path / "there/rejects.jsonl")
    with pytest.raises(DataError, match="no folder at memory://nowhere"):
        FolderSource("memory://nowhere")


def test_a_file_that_changes_behind_a_url_is_another_input(memory):
    stamps = [next(iter(FolderSource(memory({"a.png": data})))).stamp for data in (b"one", b"two")]
    assert stamps[0] != stamps[1], "though it has the same size"


def test_a_server_that_fails_stops_the_build_and_it_goes_on(tmp_path, memory, monkeypatch):
    """It says nothing about the image."""
    source = FolderSource(memory({f"{i}.png": png(i) for i in range(3)}))

    def fail(*arguments, **options):
        raise OSError("503 Slow Down")

    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
        with pytest.raises(DataError, match=r"503 Slow Down.*same command to go on"):
            build(source, tmp_path / "out", Options({}))
    assert build(source, tmp_path / "out", Options({})).counts.samples == 3


def test_images_in_tars_elsewhere_outlive_the_copy(tmp_path, memory):
    """Workers read them when the source may be at another tar."""
    for i in range(2):
        _tar(tmp_path / f"{i}.tar", {"a.png": png(i), "b.png": png(i + 7)})
    url = memory({f"{i}.tar": (tmp_path / f"{i}.tar").read_bytes() for i in range(2)})
    assert [r.image.read() for r in list(TarsSource([url]))] == [png(0), png(7), png(1), png(8)]


def test_hidden_folders_elsewhere_are_passed_over(memory):
    memory({"a/1.tar": "x", ".git/2.tar": "x", "3": "x"})
    assert tars("memory://src") == ["a/1.tar"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_behind_urls(tmp_path, memory, kind):
    rows = [{"file": f"images/{i}.png", "text": f"t{i}", "kind": "ab"[i % 2]} for i in range(5)]
    rows += [
        {"file": name, "text": "", "kind": "a"} for name in ("memory://src/images/0.png", "../other/x.png", "no.png")
    ]
    write_table(tmp_path / f"t.{kind}", rows)
    memory({f"images/{i}.png": png(i) for i in range(5)} | {f"t.{kind}": (tmp_path / f"t.{kind}").read_bytes()})
    built = build(
        TableSource([f"memory://src/t.{kind}"], Columns("file", ("text",), "kind")), tmp_path / "out", Options({})
    )
    content = members(tmp_path / "out/train")
    assert [content[f"{i:09d}.png"] for i in range(6)] == [png(i % 5) for i in range(6)]
    assert content["000000003.txt"] == b"t3" and content["000000003.cls"] == b"1"
    reasons = [r["reason"] for r in lines(tmp_path / "out/rejects.jsonl")]
    assert reasons == ["outside of memory://src", "no such file"] and built.counts.samples == 6


def test_a_data_set_elsewhere_is_split_and_merged(tmp_path, memory):
    build(source(), "memory://src/all", Options({}, shard_samples=5))
    run("split", "memory://src/all/train", "memory://src/dealt", "--split", "half=0.5")
    merge(["memory://src/dealt/train", "memory://src/dealt/half"], "memory://src/one")
    assert verify("memory://src/one", decode=1).problems == {}
    merge(["memory://src/dealt/train", "memory://src/dealt/half"], str(tmp_path / "one"))
    assert load("memory://src/one").fingerprint == load(tmp_path / "one").fingerprint
    assert len(members(tmp_path / "one")) == 24
    with pytest.raises(ConfigError, match="not empty"):
        merge(["memory://src/dealt/train", "memory://src/dealt/half"], "memory://src/one")


def test_an_interrupted_merge_goes_on(tmp_path, monkeypatch):
    for i, name in enumerate("ab"):
        build(ListSource(inline(6 * i + 6)[6 * i :]), tmp_path / name, Options({}, shard_samples=4))
    parts = [str(tmp_path / name / "train") for name in "ab"]
    merge(parts, str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        changes = _dying(patch, 7)
        with pytest.raises(Killed):
            merge(parts, str(tmp_path / "out"))
    assert len(changes) == 7 and not (tmp_path / "out/manifest.json").exists()
    merge(parts, str(tmp_path / "out"))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_tars_in_sub_folders(tmp_path):
    for name in ("a/0.tar", "b/c/1.tar", ".hidden/2.tar"):
        (tmp_path / "x" / name).parent.mkdir(parents=True)
        _tar(tmp_path / "x" / name, {f"{name[0]}{i}.png": png(i) for i in range(3)})
    manifest = index(str(tmp_path / "x"))
    assert [s.name for s in manifest.shards] == ["a/0.tar", "b/c/1.tar"]
    assert load(tmp_path / "x") == manifest
    assert load_index(manifest, manifest.shards[1]).keys == ("b0", "b1", "b2")
    assert verify(str(tmp_path / "x"), decode=1).problems == {}
    index(str(tmp_path / "x" / "a"))
    with pytest.raises(DataError, match="a/ has a manifest of its own"):
        index(str(tmp_path / "x"))
    assert TarsSource([tmp_path / "x"]).total == 6  # repacked, they are all just tars


def test_tars_in_a_folder_and_below_it_are_not_one_data_set_by_chance(tmp_path):
    for name in ("0.tar", "more/1.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        _tar(tmp_path / name, {f"{name[-5]}.png": png(1)})
    for verb in (index, TarsSource):
        with pytest.raises(DataError, match=r"and in sub-folders of it \(more/1\.tar\): say which"):
            verb(str(tmp_path) if verb is index else [tmp_path])
    assert [s.name for s in index(str(tmp_path), pattern="{0,more/1}.tar").shards] == ["0.tar", "more/1.tar"]
    index(str(tmp_path / "more"))  # a data set of its own now
    assert [s.name for s in index(str(tmp_path)).shards] == ["0.tar"]


def test_tars_behind_links(tmp_path):
    """One that leads nowhere is missed, not passed over; circles end."""
    _tar(tmp_path / "0.tar", {"a.png": png(1)})
    source = tmp_path / "x"
    (source / "sub").mkdir(parents=True)
    for name, target in {"1.tar": "../../0.tar", "again": "..", "more": "."}.items():
        (source / "sub" / name).symlink_to(target)
    (source / "sub2").symlink_to("sub")
    assert [s.name for s in index(str(source)).shards] == ["sub/1.tar"]
    assert TarsSource([source]).total == 1
    (source / "sub" / "2.tar").symlink_to("nowhere.tar")
    with pytest.raises(DataError, match=r"cannot read .*x/sub/2\.tar"):
        index(str(source))


def test_a_folder_of_data_sets_is_told_from_one(tmp_path):
    build(source(), tmp_path, OPTIONS)
    for reads in (lambda: verify(str(tmp_path)), lambda: load(tmp_path)):
        with pytest.raises(DataError, match=r"there is one in .*/train, .*/val: name that folder instead"):
            reads()


def test_unknown_scheme():
    with pytest.raises(ConfigError, match="install the fsspec package"):
        open_store("nonsense://x")


def test_two_builds_at_once_are_refused(tmp_path):
    def another(counts):
        with pytest.raises(ConfigError, match="another process is building"):
            build(source(), tmp_path / "out", OPTIONS)

    build(source(), tmp_path / "out", OPTIONS, progress=another)
    build(source(), tmp_path / "whole", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
