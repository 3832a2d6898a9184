"""show, stats, tokenizer, split, merge; and all of them from the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from data_prep.build import build
from data_prep.describe import renew_statistics, sheet, table
from data_prep.index import index
from data_prep.merge import merge
from data_prep.options import Options
from data_prep.tokenizer import SPECIAL, train_tokenizer
from data_prep.verify import verify
from launch.prep import app
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load, load_index
from tests.unit.data_prep.samples import ListSource, inline, members, opened, png, tree
from tests.unit.data_prep.test_build import lines
from tests.unit.data_prep.test_scan import _tar


def labelled(n, first=0):
    records = inline(first + n)[first:]
    return ListSource(
        [replace(r, label=i % 2, caption=f"a photo of <b>{i}</b>") for i, r in enumerate(records)], ("x", "y")
    )


def test_statistics_can_be_renewed(tmp_path):
    built = build(labelled(7), tmp_path, Options({})).manifests["train"]
    index(str(tmp_path / "train"))
    assert "mean" not in load(tmp_path / "train").statistics
    assert renew_statistics(str(tmp_path / "train")).statistics == built.statistics
    assert load(tmp_path / "train").statistics == built.statistics
    assert dict(table(built))["samples per class"] == "3 to 4 in 2"
    _tar(tmp_path / "bad.tar", {"a.png": b"x"})
    index(str(tmp_path), pattern="bad.tar")
    with pytest.raises(DataError, match="a: not an image"):
        renew_statistics(str(tmp_path))


def test_contact_sheet(tmp_path):
    build(labelled(9), tmp_path, Options({}, shard_samples=2))
    picture, page = sheet(str(tmp_path / "train"), 4)
    assert page.count("<figure") == 4 and "<b>" not in page and "&lt;b&gt;" in page and "http" not in page
    # the second tile shows sample 2 = 1 * 9 // 4, enlarged five times, in its middle
    shown = np.asarray(picture)[8 + 64, 8 + 136 + 64]
    small = np.asarray(opened(png(2)))
    assert (np.abs(small.reshape(-1, 3).astype(int) - shown).sum(1) == 0).any()
    assert np.asarray(picture).std() > 10


def test_tokenizer_is_the_same_every_time(tmp_path, monkeypatch):
    files = []
    for name, threads in (("a", "true"), ("b", "false")):
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", threads)
        build(labelled(20), tmp_path / name, Options({}))
        manifest = train_tokenizer(str(tmp_path / name / "train"), 300)
        assert manifest == load(tmp_path / name / "train")
        files.append((tmp_path / name / "train" / "tokenizer.json").read_bytes())
    assert files[0] == files[1]
    tokenizer = Tokenizer.from_file(str(tmp_path / "a/train/tokenizer.json"))
    assert [tokenizer.token_to_id(t) for t in SPECIAL] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= 300
    for text in ("a photo of a cat", "\u00fcber \U0001f600 \n\t", "<|other|>"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("A PHOTO").ids == tokenizer.encode("a photo").ids
    with pytest.raises(ConfigError):
        train_tokenizer(str(tmp_path / "a/train"), 100)
    with pytest.raises(DataError, match="no field alt"):
        train_tokenizer(str(tmp_path / "a/train"), 300, ("alt",))


def test_tokenizer_of_captions_written_in_other_ways(tmp_path):
    """A letter and its accent may be one character or two; bytes that are no UTF-8 are no reason to stop."""
    _tar(tmp_path / "x.tar", {"a.txt": b"caf\xe9", "b.txt": "cafe\u0301 au lait".encode(), "c.txt": b"lait"})
    index(str(tmp_path))
    train_tokenizer(str(tmp_path), 270)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("cafe\u0301").ids == tokenizer.encode("caf\u00e9").ids
    assert tokenizer.decode(tokenizer.encode("CAFE\u0301").ids) == "caf\u00e9"


def test_merge(tmp_path):
    for i, name in enumerate("ab"):
        build(labelled(6, first=6 * i), tmp_path / name, Options({}, shard_samples=4))
    merged = merge([str(tmp_path / n / "train") for n in "ab"], str(tmp_path / "out"))
    assert merged == load(tmp_path / "out")
    assert verify(str(tmp_path / "out"), decode=1).problems == {}
    keys = [k for s in merged.shards for k in load_index(merged, s).keys]
    assert keys == [f"{i:04d}" for i in range(12)]
    assert merged.statistics["samples"] == 12 and merged.classes == ("x", "y")
    assert members(tmp_path / "out") == members(tmp_path / "a/train") | members(tmp_path / "b/train")
    with pytest.raises(ConfigError, match="not empty"):
        merge([str(tmp_path / n / "train") for n in "ab"], str(tmp_path / "out"))
    with pytest.raises(DataError, match="key '0000' is in"):
        merge([str(tmp_path / "a/train")] * 2, str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def run(*arguments):
    app([str(a) for a in arguments], standalone_mode=False)


def test_a_life_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        path = tmp_path / "in" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i, (40, 30)))
        path.with_suffix(".txt").write_text(f"caption {i}")
    (tmp_path / "in/a/bad.jpg").write_bytes(b"no")
    run("build", "folder", "in", "out", "--split", "val=0.3", "--resize", "short", "--size", 16, "--format", "jpg")
    assert "1 of 13 inputs rejected" in capsys.readouterr().out
    (tmp_path / "in/c").mkdir()
    (tmp_path / "in/c/new.png").write_bytes(png(99))
    common = ("--resize", "short", "--size", 16, "--format", "jpg", "--append", "--split", "val=0.3")
    run("build", "folder", "in", "out", *common)
    assert load(tmp_path / "out/train").classes == ("a", "b", "c")
    run("verify", "out/train", "--decode", 1)
    run("tokenizer", "out/train", "--vocabulary", 300)
    run("stats", "out/train", "--renew")
    run("show", "out/train", "--out", "sheets/x", "--samples", 4)
    with Image.open("sheets/x.png") as picture:
        assert picture.size[0] > 128
    assert (tmp_path / "sheets/x.html").exists()
    run("split", "out/train", "dealt", "--split", "half=0.5")
    run("merge", "dealt/train", "dealt/half", "one")
    assert load("one").samples == load("out/train").samples
    (tmp_path / "names.txt").write_text("A\nB\nC\n")
    run("index", "one", "--classes", "names.txt")
    assert load("one").classes == ("A", "B", "C")
    shard = next(iter(sorted((tmp_path / "one").glob("*.tar"))))
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=shard.name):
        run("verify", "one")
    run("index", "one", "--skip")
    assert f"left out: {shard.name}" in capsys.readouterr().out


def test_what_a_build_made_is_verified_as_a_whole(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(labelled(20), tmp_path / "out", Options({"val": 0.3}))
    counts = {split: load(tmp_path / "out" / split).samples for split in ("train", "val")}
    run("verify", "out")
    assert capsys.readouterr().out.splitlines() == [
        f"out/{split}: 1 shards with {n} samples are whole, 0 decoded" for split, n in counts.items()
    ]
    run("stats", "out")
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("samples  ")] == [
        ["samples", str(n)] for n in counts.values()
    ]
    shard = tmp_path / "out/val/val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"1 of 1 files of out/val are damaged:\n  val-000000\.tar"):
        run("verify", "out")
    shard = tmp_path / "out/train/train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"(?s)files of out/train are damaged.*files of out/val are damaged"):
        run("verify", "out")
    with pytest.raises(DataError, match=r"no manifest at nothing/manifest\.json"):
        run("verify", "nothing")
    for text in ("{", "[]", '{"splits": 3}'):
        (tmp_path / "out/build.json").write_text(text)
        with pytest.raises(DataError, match=r"out/build\.json is damaged"):
            run("verify", "out")


def test_a_contact_sheet_lies_beside_the_shards(tmp_path, monkeypatch):
    """And nothing in the folder that one happens to be in."""
    build(labelled(3), tmp_path / "out", Options({}))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("show", "../out/train")
    assert not any((tmp_path / "here").iterdir())
    assert {p.suffix for p in (tmp_path / "out/train").glob("sheet.*")} == {".png", ".html"}
    run("verify", "../out")
    run("show", "../out/train", "--out", "mine")
    assert {p.name for p in (tmp_path / "here").iterdir()} == {"mine.png", "mine.html"}


def test_tables_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png(1))
    rows = [{"image": "a.png", "text": "x" * i, "kind": "k"} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run("build", "table", "t.jsonl", "out", "--caption", "text", "--label", "kind", "--split", "val=0")
    assert load("out/train").samples == 4 and not (tmp_path / "out/val").exists()
    run("build", "table", "t.jsonl", "few", "--caption", "text", "--filter", "min_caption=2", "--split", "val=0")
    assert [r["input"] for r in lines(tmp_path / "few/rejects.jsonl")] == [0, 1]
    run("build", "tars", "few/train", "again", "--split", "val=0")
    assert load("again/train").samples == 2
    (tmp_path / "u.csv").write_text("url\nhttp://127.0.0.1:9/x\nfile:///etc/passwd\n")
    with pytest.raises(DataError, match="a private address"):
        run("build", "urls", "u.csv", "web", "--split", "val=0", "--limit", "retries=0")
    for wrong in (("--filter", "min_sid=2"), ("--filter", "x"), ("--split", "val=a"), ("--limit", "tries=1")):
        with pytest.raises(ConfigError):
            run("build", "urls", "u.csv", "bad", *wrong)


def test_embedded_data_on_the_command_line(tmp_path):
    run("build", "digits", tmp_path / "d", "--pixels", 8)
    run("build", "glyphs", tmp_path / "g", "--characters", 2, "--samples", 1)
    before = tree(tmp_path)
    run("build", "digits", tmp_path / "d", "--pixels", 8)
    assert tree(tmp_path) == before
