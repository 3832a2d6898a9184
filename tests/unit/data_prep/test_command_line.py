"""Every option of `sluice prep` arrives where it decides something."""

import pytest
from torchvision import datasets

from data_prep.build import build
from data_prep.options import Duplicates, FetchOptions, Filters, ImageOptions, Options
from data_prep.sources.table import Columns
from launch import prep_build
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load
from tests.unit.data_prep.samples import ListSource, inline, png
from tests.unit.data_prep.test_scan import _tar
from tests.unit.data_prep.test_verbs import labelled, run


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Runs a command in a folder of its own and gives what it would have built: source, options, append."""
    calls = []

    def note(source, out, options, *, append=False):
        calls.append((source, options, append))

    monkeypatch.setattr(prep_build, "run_build", note)
    monkeypatch.chdir(tmp_path)

    def run_it(*arguments):
        calls.clear()
        run(*arguments)
        return calls[0]

    return run_it


def test_options_that_all_sources_share(asked):
    assert asked("build", "digits", "out")[1:] == (Options(), False)
    splits = ("--split", "a=0.1", "--split", "b=0.2", "--split", "c=0", "--seed", 7)
    shards = ("--shard-samples", 5, "--shard-bytes", 999, "--workers", 3, "--append", "--domain", "ink")
    image = ("--format", "webp", "--quality", 33, "--resize", "long", "--size", 40, "--enlarge")
    kept = ("--filter", "min_side=3", "--filter", "max_aspect=2.5", "--filter", "caption=a=b")
    _, options, append = asked(
        *("build", "digits", "out", *splits, *shards, *image, *kept, "--duplicates", "report", "--distance", 4)
    )
    assert append and options == Options(
        {"a": 0.1, "b": 0.2},
        seed=7,
        shard_samples=5,
        shard_bytes=999,
        image=ImageOptions("webp", 33, "long", 40, True),
        filters=Filters(min_side=3, max_aspect=2.5, caption="a=b"),
        duplicates=Duplicates("report", 4),
        workers=3,
        domain="ink",
    )


def test_options_of_tables(asked, tmp_path):
    (tmp_path / "t.csv").write_text("u,c,d,l,k,h\n,,,x,,\n")
    common = ("--caption", "c", "--caption", "d", "--label", "l")
    source, options, _ = asked("build", "table", "t.csv", "out", *common, "--image", "u", "--key", "k", "--root", "r")
    assert (source.tables, source.columns, source.root) == (["t.csv"], Columns("u", ("c", "d"), "l", "k"), "r")
    assert options.fetch is None
    source, options, _ = asked("build", "urls", "t.csv", "out", *common, "--url", "u", "--expected", "h")
    assert (source.columns, options.fetch) == (Columns("u", ("c", "d"), "l", "", "h"), FetchOptions())
    wide = ("--limit", "retries=0", "--limit", "timeout=2.5", "--limit", "agent=me", "--private", "--no-robots")
    _, options, _ = asked("build", "urls", "t.csv", "out", "--url", "u", *wide)
    assert options.fetch == FetchOptions(retries=0, timeout=2.5, agent="me", private=True, robots=False)


def test_options_that_choose_rows_images_and_captions(asked, tmp_path, capsys):
    (tmp_path / "t.csv").write_text("image,url,n\nx,x,1\ny,y,2\n")
    for kind in ("table", "urls"):
        source = asked("build", kind, "t.csv", "out", "--where", "n > 1")[0]
        assert (source.where, source.total) == ("n > 1", 1)
        assert "takes 1 rows, and passes over 1" in capsys.readouterr().err
    assert asked("build", "table", "t.csv", "out")[0].where == "" and capsys.readouterr().err == ""
    _tar(tmp_path / "x.tar", {"s.input.jpg": b"x", "s.json": b"{}"})
    source = asked("build", "tars", "x.tar", "out", "--image-field", ".Input.jpg", "--caption", "text")[0]
    assert (source.image, source.caption) == ("input.jpg", "text")
    (tmp_path / "in/train").mkdir(parents=True)
    (tmp_path / "in/train/1.png").write_bytes(png())
    source = asked("build", "folder", "in", "out", "--layout", "classes", "--caption", "text")[0]
    assert (source.layout, source.caption, source.classes) == ("classes", "text", ("train",))
    (tmp_path / "in/train/1.json").write_text('{"caption": "no", "text": ["yes", "more"]}')
    assert [r.caption for r in source] == [None] and [
        r.caption for r in asked("build", "folder", "in", "out", "--caption", "text")[0]
    ] == ["yes"]


def test_options_of_other_sources(asked, tmp_path, monkeypatch):
    for name in ("in/a/1.png", "in/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png())
    _tar(tmp_path / "x.tar", {"dog/a.png": png(), "dog/a.cls": b"5"})
    assert asked("build", "folder", "in", "out", "--no-shuffle", "--links", "--seed", 3)[0].describe() == {
        **{"kind": "folder", "root": "in", "shuffle": False, "seed": 3, "links": True}
    }
    assert asked("build", "folder", "in", "out")[0].describe()["links"] is False
    assert asked("build", "folder", "in", "out")[0].shuffle
    assert asked("build", "tars", "x.tar", "out")[0].classes == tuple("012345")
    assert asked("build", "tars", "x.tar", "out", "--label", "folder")[0].classes == ("dog",)
    assert asked("build", "digits", "out", "--pixels", 9)[0].size == 9
    assert asked("build", "digits", "out", "--held-out", 7)[0].held_out == 7
    source = asked("build", "typefaces", "out", "--digits", 8, "--samples", 2, "--pixels", 9, "--seed", 4)[0]
    assert (source.digits, source.samples, source.size, source.seed) == (8, 2, 9, 4)
    source = asked(
        *("build", "glyphs", "out", "--characters", 3, "--samples", 2, "--pixels", 17, "--variation", 0.5, "--seed", 4)
    )[0]
    assert (source.characters, source.samples, source.size, source.variation, source.seed) == (3, 2, 17, 0.5, 4)


def test_arguments_of_torchvision(asked, monkeypatch):
    """They are given to the data set as numbers, as yes or no, or as text."""
    made = []

    class FakeData(list):
        def __init__(self, root, **arguments):
            made.append((root, arguments))

    monkeypatch.setattr(datasets, "FakeData", FakeData)
    chosen = ("--train", "fold=3", "--train", "train=True", "--train", "split=a=b", "--val", "train=false")
    assert set(asked("build", "torchvision", "FakeData", "there", "out", *chosen)[0].splits) == {"train", "val"}
    assert set(asked("build", "torchvision", "FakeData", "other", "out")[0].splits) == {"train"}
    wanted = {"fold": 3, "train": True, "split": "a=b"}
    assert made == [("there", wanted), ("there", {"train": False}), ("other", {})]


@pytest.mark.parametrize("kind", ["folder", "table", "urls", "tars", "torchvision"])
def test_what_is_added_keeps_the_numbers_of_classes(asked, tmp_path, kind):
    build(ListSource(inline(2), ("zebra", "yak")), tmp_path / "out", Options({}))
    (tmp_path / "in/ant").mkdir(parents=True)
    (tmp_path / "in/ant/1.png").write_bytes(png())
    (tmp_path / "t.csv").write_text("image,url,kind\n,,ant\n")
    _tar(tmp_path / "x.tar", {"a.png": png(), "a.cls": b"ant"})
    what = {"folder": ("in", "out"), "tars": ("x.tar", "out"), "torchvision": ("ImageFolder", "in", "out")}
    what = what.get(kind, ("t.csv", "out", "--label", "kind"))
    assert asked("build", kind, *what, "--append")[0].classes == ("zebra", "yak", "ant")
    assert asked("build", kind, *what)[0].classes == ("ant",)


def test_options_of_split(asked, tmp_path):
    build(labelled(4), tmp_path / "all", Options({}))
    _tar(tmp_path / "all/train/unlisted.tar", {"x.png": png()})
    arguments = ("split", "all/train", "out", "--split", "half=0.5", "--seed", 5, "--workers", 2)
    source, options, _ = asked(*arguments)
    assert options == Options({"half": 0.5}, seed=5, workers=2)
    assert source.classes == ("x", "y") and source.total == 4, "only what the manifest lists"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--filter", "min_side=nan"), "whole number, not 'nan'"),
        (("--filter", "min_side=2.5"), "whole number, not '2.5'"),
        (("--filter", "max_area=inf"), "whole number, not 'inf'"),
        (("--limit", "private=1"), "unknown 'private'"),
        (("--limit", "robots=0"), "unknown 'robots'"),
        (("--limit", "timeout=inf"), "seconds are waited"),
    ],
)
def test_numbers_that_are_none_are_refused(asked, tmp_path, arguments, reason):
    (tmp_path / "t.csv").write_text("url\n")
    with pytest.raises(ConfigError, match=reason):
        asked("build", "urls", "t.csv", "out", *arguments)


def test_a_source_that_cannot_be_read_is_a_clear_error(asked, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()

    def refuse(*arguments):
        raise PermissionError(13, "Permission denied", "in")

    monkeypatch.setattr("data_prep.places.listing", refuse)
    with pytest.raises(DataError, match=r"the source cannot be read: .*Permission denied"):
        asked("build", "folder", "in", "out")


@pytest.mark.parametrize("verb", ["index", "verify", "stats", "show", "tokenizer", "merge"])
def test_what_the_system_refuses_is_a_clear_error(tmp_path, monkeypatch, verb):
    monkeypatch.chdir(tmp_path)
    build(labelled(4), tmp_path / "all", Options({}))

    def refuse(*arguments, **options):
        raise OSError(28, "No space left on device")

    target = {"stats": "describe.renew_statistics", "show": "describe.sheet", "tokenizer": "tokenizer.train_tokenizer"}
    monkeypatch.setattr(f"data_prep.{target.get(verb, f'{verb}.{verb}')}", refuse)
    more = {"stats": ["--renew"], "merge": ["all/train"]}
    with pytest.raises(DataError, match=f"{verb} stopped: .*No space left"):
        run(verb, "all/train", *more.get(verb, []))


def test_options_of_verbs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _tar(tmp_path / "0.tar", {"a.png": png(1), "a.txt": b"x", "a.note.txt": b"zzzzzz zzzzzz"})
    _tar(tmp_path / "1.tar", {"b.png": b"no image", "b.txt": b"x"})
    run("index", ".", "--tars", "0.tar")
    assert [shard.name for shard in load(".").shards] == ["0.tar"]
    run("index", ".")
    assert [shard.name for shard in load(".").shards] == ["0.tar", "1.tar"]
    with pytest.raises(DataError, match=r"no member is named \.input\.jpg, only \.note\.txt, \.png, \.txt"):
        run("index", ".", "--image-field", "input.jpg")
    run("verify", ".")
    assert "0 decoded" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"1 of 2 files of \. are damaged:\n  1\.tar: b\.png"):
        run("verify", ".", "--decode", 1)
    run("tokenizer", ".", "--vocabulary", 262, "--field", "note.txt")
    assert '"zz"' in (tmp_path / "tokenizer.json").read_text()
    for samples in (1, 2):
        run("show", ".", "--out", f"new/{samples}", "--samples", samples)
        assert (tmp_path / f"new/{samples}.html").read_text().count("<figure") == samples
