"""Building: the same bytes every time, nothing lost on the way, and interrupted anywhere without harm."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np
import pytest

from data_prep import prepare
from data_prep.build import build
from data_prep.options import Duplicates, FetchOptions, Filters, ImageOptions, Options
from data_prep.record import Inline, Record
from data_prep.store import LocalStore
from pipeline.core.errors import ConfigError, DataError
from pipeline.core.manifest import load, load_index
from tests.unit.data_prep.samples import ListSource, inline, members, opened, png, tree

OPTIONS = Options(splits={"val": 0.3}, shard_samples=4)


def source(n: int = 23) -> ListSource:
    records = [replace(r, label=i % 3, caption=f"number {i}") for i, r in enumerate(inline(n))]
    records[5] = replace(records[5], image=Inline(b"no image"))
    records[11] = replace(records[11], image=records[2].image)
    records[12] = replace(records[12], caption="")
    return ListSource(records, ("a", "b", "c"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_input_is_written_or_rejected(tmp_path):
    built = build(source(), tmp_path, OPTIONS)
    rejects = lines(tmp_path / "rejects.jsonl")
    assert [r["input"] for r in rejects] == [5]
    assert "not an image" in rejects[0]["reason"] and rejects[0]["key"] == "0005"
    assert (built.counts.inputs, built.counts.samples, built.counts.rejects) == (23, 22, 1)
    content = members(tmp_path / "train") | members(tmp_path / "val")
    for i, record in enumerate(source().records):
        if i != 5:
            assert content[f"{i:04d}.png"] == record.image.data
            assert content[f"{i:04d}.cls"] == str(i % 3).encode()
            assert content[f"{i:04d}.txt"] == record.caption.encode()
    assert len(content) == 22 * 3


def test_manifest_and_index_describe_the_shards(tmp_path):
    built = build(source(), tmp_path, OPTIONS)
    for split, manifest in built.manifests.items():
        assert load(tmp_path / split) == manifest
        assert manifest.fields == {"image": ("png",), "label": ("cls",), "caption": ("txt",)}
        assert manifest.classes == ("a", "b", "c")
        content = members(tmp_path / split)
        keys = []
        for shard in manifest.shards:
            data = (tmp_path / split / shard.name).read_bytes()
            assert len(data) == shard.bytes and shard.samples <= 4
            index = load_index(manifest, shard)
            keys += index.keys
            for row, key in enumerate(index.keys):
                for column, extension in enumerate(("png", "cls", "txt")):
                    at, size = index.offset[row, column], index.size[row, column]
                    assert data[at : at + size] == content[f"{key}.{extension}"]
        assert keys == sorted(keys) and len(keys) == manifest.samples


def test_splits_follow_the_identity_alone(tmp_path):
    few = build(ListSource(inline(30)), tmp_path / "few", OPTIONS)
    many = build(ListSource(inline(60)[::-1]), tmp_path / "many", OPTIONS)
    for split in few.manifests:
        assert set(members(tmp_path / "few" / split)) <= set(members(tmp_path / "many" / split))
    assert 0.1 < many.manifests["val"].samples / 60 < 0.5


def test_workers_do_not_change_a_byte(tmp_path):
    options = replace(OPTIONS, duplicates=Duplicates("drop", 4))
    build(source(60), tmp_path / "0", options)
    build(source(60), tmp_path / "2", replace(options, workers=2))
    assert tree(tmp_path / "0") == tree(tmp_path / "2")


def test_shards_are_limited_by_bytes(tmp_path):
    manifest = build(ListSource(inline(20)), tmp_path, Options({}, shard_bytes=12_000)).manifests["train"]
    assert len(manifest.shards) > 2
    assert all(s.bytes <= 12_000 + 10_240 for s in manifest.shards)
    huge = ListSource([Record("big", "big", Inline(png(0, (300, 300))))])
    assert build(huge, tmp_path / "huge", Options({}, shard_bytes=1)).manifests["train"].samples == 1


def test_statistics(tmp_path):
    records = [Record(str(i), str(i), Inline(png(i, (10 + i, 20))), label=i % 2, caption="x" * i) for i in range(7)]
    statistics = (
        build(ListSource(records, ("a", "b")), tmp_path, Options({}, shard_samples=3)).manifests["train"].statistics
    )
    pixels = np.concatenate([np.asarray(opened(r.image.data)).reshape(-1, 3) for r in records]) / 255
    np.testing.assert_allclose(statistics["mean"], pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(statistics["std"], pixels.std(0), atol=1e-6)
    assert statistics["samples"] == 7 and statistics["labels"] == {"0": 4, "1": 3}
    width = statistics["measures"]["width"]
    assert (width["min"], width["max"], width["sum"], width["below"]) == (10, 16, 91, {"16": 6, "32": 1})
    assert statistics["measures"]["caption_length"]["sum"] == 21


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs, clean-up included."""


def _dying(monkeypatch, at: int):
    """Make the ``at``-th change of the output folder the last one; returns a list that counts them."""
    done: list[str] = []

    def wrap(name):
        original = getattr(LocalStore, name)

        def method(self, *arguments):
            if len(done) == at:
                raise Killed
            done.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(LocalStore, name, method)

    for name in ("write", "staging", "publish", "remove"):
        wrap(name)
    # of all that a store has open, a kill ends the lock
    monkeypatch.setattr(LocalStore, "close", lambda self: os.close(self._lock) if self._lock is not None else None)
    return done


@pytest.mark.parametrize("action", ["off", "drop", "report"])
def test_killed_at_any_change_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, action):
    options = replace(OPTIONS, duplicates=Duplicates(action, -1 if action == "off" else 3))
    whole = tmp_path / "whole"
    with monkeypatch.context() as patch:
        changes = _dying(patch, 10**9)
        build(source(), whole, options)
    assert len(changes) > 20
    for at in range(0, len(changes), 1 if action == "off" else 5):
        out = tmp_path / f"killed{at}"
        with monkeypatch.context() as patch:
            _dying(patch, at)
            with pytest.raises(Killed):
                build(source(), out, options)
        before = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
        noted = {p.name.split(".")[0] + "-" + p.name.split(".")[1][2:] for p in out.glob(".build/*.*.json")}
        built = build(source(), out, options)
        assert tree(out) == tree(whole), at
        assert (built.counts.inputs, built.counts.samples + built.counts.rejects) == (23, 23)
        for path, time in before.items():
            if path.stem in noted:
                assert path.stat().st_mtime_ns == time, "a finished shard was made again"


KILL = """
import os, signal, sys
from dataclasses import replace
from data_prep.build import build
from tests.unit.data_prep.test_build import OPTIONS, source
def progress(counts):
    if counts.inputs == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    build(source(), sys.argv[1], replace(OPTIONS, workers=int(sys.argv[3])), progress=progress)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_real_sigkill(tmp_path, workers):
    """Workers hold their standard output open, so ``run`` does not return before they have ended too."""
    build(source(), tmp_path / "whole", OPTIONS)
    (tmp_path / "kill.py").write_text(KILL)
    command = [sys.executable, tmp_path / "kill.py", tmp_path / "out", "15", str(workers)]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    child = subprocess.run(command, env=environment, check=False, stdout=subprocess.PIPE, timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert any((tmp_path / "out").rglob("*.part"))
    build(source(), tmp_path / "out", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def _stop_after(n: int):
    def progress(counts):
        if counts.inputs == n:
            raise KeyboardInterrupt

    return progress


def test_changed_input_or_options_are_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        build(source(), tmp_path, OPTIONS, progress=_stop_after(20))
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(ConfigError, match=r"options\.shard_samples: 4 there, 5 now"):
        build(source(), tmp_path, replace(OPTIONS, shard_samples=5))
    changed = source()
    changed.records[1] = replace(changed.records[1], stamp="other")
    with pytest.raises(DataError, match=r"is not what the . finished shards"):
        build(changed, tmp_path, OPTIONS)
    with pytest.raises(DataError, match=r"is not what the . finished shards"):
        build(ListSource(source().records[:3], ("a", "b", "c")), tmp_path, OPTIONS)
    build(source(), tmp_path, OPTIONS)
    before = tree(tmp_path)
    build(source(), tmp_path, OPTIONS)
    assert tree(tmp_path) == before
    with pytest.raises(DataError, match="input has changed"):
        build(changed, tmp_path, OPTIONS)
    with pytest.raises(ConfigError, match="other settings"):
        build(replace(source(), name="other"), tmp_path, OPTIONS)
    assert tree(tmp_path) == before


def test_shards_of_another_origin_are_not_overwritten(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="another origin"):
        build(source(), tmp_path, OPTIONS)
    assert tree(tmp_path) == {"train/mine.tar": b"mine"}


def test_disk_full_is_clear_and_can_be_mended(tmp_path, monkeypatch):
    from data_prep import ustar

    build(source(), tmp_path / "whole", OPTIONS)
    original, written = ustar.TarWriter._write, []

    def write(self, data):
        written.append(data)
        if len(written) == 14:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(ustar.TarWriter, "_write", write)
        with pytest.raises(DataError, match=r"No space left.*same command to go on"):
            build(source(), tmp_path / "out", OPTIONS)
    assert not list(tmp_path.rglob("*.part"))
    assert not list((tmp_path / "out").rglob("manifest.json"))
    build(source(), tmp_path / "out", OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_nothing_left_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not an image"):
        build(ListSource([Record("a", "a", Inline(b"x")), Record("b", "b", Inline(b""))]), tmp_path / "a")
    assert [r["key"] for r in lines(tmp_path / "a/rejects.jsonl")] == ["a", "b"]
    with pytest.raises(DataError, match="source is empty"):
        build(ListSource([]), tmp_path / "b")


def test_filters(tmp_path):
    sizes = [(64, 64), (16, 64), (64, 15), (200, 100), (40, 40)]
    records = [Record(str(i), str(i), Inline(png(i, s)), caption="a cat") for i, s in enumerate(sizes)]
    records.append(replace(records[0], key="5", caption="a dog"))
    records.append(replace(records[0], key="6", caption="cat"))
    records.append(replace(records[0], key="7", caption="a cat" * 9))
    records.append(replace(records[0], key="8", caption=None))
    filters = Filters(
        min_side=16, max_aspect=3, min_area=2000, max_area=10_000, min_caption=4, max_caption=20, caption="cat$"
    )
    build(ListSource(records), tmp_path, Options({}, filters=filters))
    assert [name for name in members(tmp_path / "train") if name.endswith("png")] == ["0.png"]
    reasons = {r["key"]: r["reason"] for r in lines(tmp_path / "rejects.jsonl")}
    assert reasons["1"].startswith("aspect ratio 4.00")
    assert reasons["2"].startswith("side of 15")
    assert reasons["3"].startswith("area of 20000")
    assert reasons["4"].startswith("area of 1600")
    assert "does not match" in reasons["5"]
    assert reasons["6"].startswith("caption of 3") and reasons["7"].startswith("caption of 45")
    assert reasons["8"].startswith("caption of 0")


def test_what_is_too_small_is_not_decoded(tmp_path):
    """Size is in the first bytes: these have no more."""
    records = [Record("a", "a", Inline(png(0, (64, 64)))), Record("b", "b", Inline(png(1, (20, 20))[:60] + b"IEND"))]
    build(ListSource(records), tmp_path, Options({}, filters=Filters(min_side=32)))
    assert [r["reason"] for r in lines(tmp_path / "rejects.jsonl")] == ["side of 20 pixels, least is 32"]


def test_bad_options_are_refused():
    for make in (
        lambda: Options({"train": 0.1}),
        lambda: Options({"a": 0.6, "b": 0.6}),
        lambda: Options({"a": -0.1, "b": 0.6}),
        lambda: Options({"a": float("nan")}),
        lambda: Options(shard_bytes=0),
        lambda: Options(workers=-1),
        lambda: Options({"../x": 0.1}),
        lambda: Options(shard_samples=0),
        lambda: Filters(caption="("),
        lambda: Filters(max_aspect=0.5),
        lambda: Duplicates("drop", 40),
        lambda: Duplicates("off", 3),
        lambda: ImageOptions("jpg", enlarge=True),
    ):
        with pytest.raises(ConfigError):
            make()
    Filters(max_aspect=1)  # squares only


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"shard_bytes": 10**6},
        {"splits": {"val": 0.31}},
        {"image": ImageOptions("webp")},
        {"filters": Filters(min_side=1)},
        {"duplicates": Duplicates("report")},
        {"fetch": FetchOptions()},
    ],
)
def test_all_that_decides_the_bytes_is_remembered(tmp_path, other):
    few = ListSource(inline(3))
    build(few, tmp_path, OPTIONS)
    with pytest.raises(ConfigError, match="other settings"):
        build(few, tmp_path, replace(OPTIONS, **other))
    build(few, tmp_path, replace(OPTIONS, workers=1))


@dataclass(frozen=True)
class Deadly:
    """A payload that ends the process that reads it."""

    def read(self):
        os._exit(9)


def test_a_worker_that_dies_is_a_clear_error(tmp_path):
    records = inline(3)
    records[1] = replace(records[1], image=Deadly())
    with pytest.raises(DataError, match=r"a worker died .* Run again to go on"):
        build(ListSource(records), tmp_path, replace(OPTIONS, workers=1))


def test_batches_are_small_where_records_are_large(monkeypatch):
    monkeypatch.setattr(prepare, "BATCH_BYTES", 100)
    tasks = [(i, "train", Record(str(i), str(i), Inline(bytes(size)))) for i, size in enumerate([60, 39, 1, 100, 7])]
    assert [[place for place, *_ in batch] for batch in prepare._batches(tasks)] == [[0, 1, 2], [3], [4]]


def test_metadata_is_written_the_same_whatever_its_order(tmp_path):
    """And what JSON does not know is written as text."""
    (first,) = inline(1)
    day = datetime(2020, 2, 3)
    for name, table in (("a", {"b": 1, "a": day, "\u00e4": 2}), ("b", {"\u00e4": 2, "a": day, "b": 1})):
        build(ListSource([replace(first, metadata=table)]), tmp_path / name, Options({}))
    written = members(tmp_path / "a/train")["0000.json"]
    assert json.loads(written) == {"a": "2020-02-03 00:00:00", "b": 1, "\u00e4": 2}
    assert written == members(tmp_path / "b/train")["0000.json"]
