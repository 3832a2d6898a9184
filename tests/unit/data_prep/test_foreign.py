"""What others wrote is never replaced, and what a tar holds beside samples is counted, followed or refused."""

import io
import os
import subprocess
import tarfile

import pytest
from typer.testing import CliRunner

from data_prep.build import build
from data_prep.index import index
from data_prep.options import Options
from data_prep.scan import scan
from data_prep.sources.tars import TarsSource
from data_prep.tokenizer import train_tokenizer
from data_prep.verify import verify
from launch.prep import app
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from tests.unit.data_prep.samples import ListSource, inline, members, png, tree, write_tar
from tests.unit.data_prep.test_build import _stop_after, lines

CONTENT = {name: data for i in range(3) for name, data in ((f"{i}.png", png(i)), (f"{i}.txt", b"hello"))}
FOREIGN = {
    "x.idx": b"v1.2 3\npng 512 757 0.png\n",
    "manifest.json": b'{"name": "my own dataset card", "hours": 1000}',
    "sizes.json": b'{"x.tar": 3, "note": "hand-made"}',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_indexing_replaces_nothing_of_another_program(tmp_path, name):
    write_tar(tmp_path / "x.tar", CONTENT)
    (tmp_path / name).write_bytes(FOREIGN[name])
    with pytest.raises(ConfigError, match=rf"{name} is not Sluice's.*move it away"):
        index(str(tmp_path))
    assert (tmp_path / name).read_bytes() == FOREIGN[name] and not {"manifest.json"} - {name} & set(tree(tmp_path))
    (tmp_path / name).unlink()
    first = index(str(tmp_path))
    assert index(str(tmp_path)) == first, "its own files are renewed"


def test_sizes_that_say_the_same_are_no_obstacle(tmp_path):
    """As open_clip's users have them, in any form."""
    write_tar(tmp_path / "x.tar", CONTENT)
    (tmp_path / "sizes.json").write_text('{"x.tar":3}')
    assert index(str(tmp_path)).samples == 3


def test_a_tokenizer_of_another_program_stays(tmp_path):
    write_tar(tmp_path / "x.tar", CONTENT)
    index(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"tokenizer\.json is not the manifest's.*move it away"):
        train_tokenizer(str(tmp_path), 300)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    (tmp_path / "tokenizer.json").unlink()
    assert train_tokenizer(str(tmp_path), 300) == train_tokenizer(str(tmp_path), 300)


@pytest.mark.parametrize(
    "name", ["rejects.jsonl", "train/manifest.json", "val/sizes.json", "train/mine.tar", "train/a.png"]
)
def test_a_build_begins_in_no_folder_of_another_program(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ConfigError, match=f"holds files of another origin, {name}"):
        build(ListSource(inline(2)), tmp_path, Options({"val": 1.0} if name.startswith("val") else {}))
    assert tree(tmp_path)[name] == b"mine"


@pytest.mark.parametrize("text", ["not JSON", "[]", '{"name": "my build"}', "7"])
def test_a_build_file_of_another_program(tmp_path, text):
    (tmp_path / "build.json").write_text(text)
    with pytest.raises(ConfigError, match=r"build\.json is not of a build"):
        build(ListSource(inline(2)), tmp_path, Options({}))
    assert tree(tmp_path) == {"build.json": text.encode()}


def notes_of(tmp_path, monkeypatch):
    """A complete data set, and the files of its .build as they were before they were removed."""
    from data_prep.store import LocalStore

    kept = {}

    def keep(self, folder):
        kept.update(tree(self.root / folder))

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "remove", keep)
        build(ListSource(inline(6)), tmp_path, Options({}, shard_samples=2))
    for name in kept:
        (tmp_path / ".build" / name).unlink()
    return kept


@pytest.mark.parametrize(
    "left", [["train.00000002.json"], ["train.00000000.json", "train.00000001.json"], ["base.json"]]
)
@pytest.mark.parametrize("killed", [False, True])
def test_notes_that_a_finished_build_left_are_no_obstacle(tmp_path, monkeypatch, left, killed):
    """It was killed while it removed them; what is added then may be killed too."""
    kept = notes_of(tmp_path, monkeypatch)
    for name in left:
        (tmp_path / ".build" / name).write_bytes(kept.get(name, b'{"train": "{}"}'))
    more = ListSource(inline(12)[6:], name="more")
    if killed:
        with pytest.raises(KeyboardInterrupt):
            build(more, tmp_path, Options({}, shard_samples=2), append=True, progress=_stop_after(5))
    built = build(more, tmp_path, Options({}, shard_samples=2), append=True)
    assert built.manifests["train"].samples == 12 and not verify(str(tmp_path / "train"), decode=1).problems
    assert not (tmp_path / ".build").exists()


# -- what tars hold beside samples


def tar(path, *more):
    """CONTENT, then members of other kinds: name, kind, target."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in CONTENT.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, kind, target in more:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
    return path


HARD, SOFT = tarfile.LNKTYPE, tarfile.SYMTYPE
LINKS = [("3.png", HARD, "0.png"), ("3.txt", HARD, "./1.txt"), ("a/4.png", SOFT, "../2.png"), ("5.png", SOFT, "0.png")]
LONG = "d/" * 80 + "6.png"


def test_links_in_tars_are_followed_or_counted(tmp_path):
    path = tar(tmp_path / "x.tar", *LINKS, (LONG, HARD, "1.png"), ("7.png", HARD, LONG), ("b.png", SOFT, "nowhere"))
    source = TarsSource([path])
    assert (source.total, dict(source.passed)) == (8, {"links": 1})
    build(source, tmp_path / "out", Options({}))
    found = members(tmp_path / "out/train")
    assert [v for k, v in sorted(found.items()) if k.endswith("png") and "/3" in k] == [png(0)]
    assert [v for k, v in sorted(found.items()) if "a/4" in k or k.endswith("/5.png")] == [png(0), png(2)]
    assert sum(v == png(1) for v in found.values()) == 3 and found["00000/3.txt"] == b"hello"
    manifest = index(str(tmp_path), pattern="x.tar")
    assert manifest.samples == 8 and manifest.made["indexed"]["passed_over"] == {"links": 1}
    assert not verify(str(tmp_path), decode=1).problems


def test_files_that_are_no_samples_are_counted(tmp_path):
    content = {**CONTENT, ".hidden.png": png(9), "._0.png": b"\0\5", "extra": png(8), "d/README": b"x", "__so__": b"y"}
    write_tar(tmp_path / "x.tar", content)
    expected = {"hidden files": 2, "files without an extension": 2}
    assert index(str(tmp_path)).made["indexed"]["passed_over"] == expected
    source = TarsSource([tmp_path / "x.tar"])
    assert dict(source.passed) == expected and source.total == 3
    assert not verify(str(tmp_path), decode=1).problems


def test_a_tar_without_samples_is_not_whole(tmp_path):
    write_tar(tmp_path / "x.tar", {f"img{i}": png(i) for i in range(3)})
    with pytest.raises(DataError, match=r"x\.tar: no samples, only 3 files without an extension"):
        index(str(tmp_path))
    write_tar(tmp_path / "y.tar", CONTENT)
    built = build(TarsSource([tmp_path / "x.tar", tmp_path / "y.tar"]), tmp_path / "out", Options({}))
    assert (built.counts.samples, built.counts.rejects) == (3, 1)
    assert "no samples, only 3 files" in lines(tmp_path / "out/rejects.jsonl")[0]["reason"]
    write_tar(tmp_path / "x.tar", {})
    assert index(str(tmp_path), pattern="{x,y}.tar").samples == 3, "an empty archive is whole"


@pytest.mark.parametrize("form", ["posix", "gnu"])
def test_files_with_holes_are_not_read_as_their_map(tmp_path, form):
    source = tmp_path / "in"
    source.mkdir()
    (source / "0.png").write_bytes(png())
    with open(source / "0.npy", "wb") as f:
        f.write(b"HEAD")
        f.seek(1 << 20)
        f.write(b"TAIL")
    command = [
        "tar",
        "--sort=name",
        "--sparse",
        f"--format={form}",
        "-cf",
        str(tmp_path / "x.tar"),
        "-C",
        str(source),
        "0.npy",
        "0.png",
    ]
    subprocess.run(command, check=True)
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getmember("0.npy").issparse()
    assert ("map of its parts" if form == "posix" else "unknown kind") in scan(tmp_path / "x.tar").problem
    with pytest.raises(DataError, match="damaged tars"):
        index(str(tmp_path))


def test_names_with_a_hash_behind_their_first_dot_are_refused(tmp_path):
    """Each would be a column of its own: the index of 3 MB had 216."""
    write_tar(tmp_path / "x.tar", {f"cat{i}.{i:08x}.jpg": b"x" for i in range(500)})
    with pytest.raises(DataError, match=r"500 extensions in 500 samples, like '00000000\.jpg'.*without other dots"):
        index(str(tmp_path))
    assert not [p for p in os.listdir(tmp_path) if p.endswith(".idx")]
    frames = {f"clip{i}.{j:04d}.jpg": b"x" for i in range(3) for j in range(150)}
    write_tar(tmp_path / "x.tar", frames)
    assert len(index(str(tmp_path)).fields) == 150, "many frames of each sample are none"
    assert load(str(tmp_path)).samples == 3


def test_what_was_passed_over_is_said(tmp_path):
    tar(tmp_path / "x.tar", *LINKS, ("b.png", SOFT, "nowhere"))
    shown = CliRunner().invoke(app, ["index", str(tmp_path)])
    assert "passed over: 1 links" in shown.output
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in/x.tar", {**CONTENT, "extra": b"x"})
    command = ["build", "tars", str(tmp_path / "in"), str(tmp_path / "out"), "--split", "val=0"]
    assert "passed over: 1 files without an extension" in CliRunner().invoke(app, command).output
