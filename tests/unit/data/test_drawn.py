"""Parts that are drawn by a hash of the key: held-out samples, few labels, fewer classes."""

import hashlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.config.schema import ByLabel, Data, EvalData, HeldOut, Image, Source
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.data.dataset import keys_of, open_data
from pipeline.data.evaluation import open_eval
from pipeline.data.stream import open_stream
from tests.unit.data.shards import save, write_data

SIZES = [50, 0, 90, 60]
COUNT = sum(SIZES)
CLASSES = tuple(f"c{i}" for i in range(5))
FIELDS = {"label": ("cls",), "caption": ("txt",)}


def label_of(number):
    """Classes of 80, 50, 40, 20 and 10 samples."""
    return int(np.searchsorted([8, 13, 17, 19], number % 20, side="right"))


def write(folder, sizes=SIZES, first=0, classes=CLASSES):
    folder.mkdir(parents=True, exist_ok=True)
    own = lambda n: {"cls": str(label_of(n + first)).encode(), "txt": b"a"}  # noqa: E731
    manifest = replace(write_data(folder, sizes, own, FIELDS), classes=classes)
    save(manifest, folder)
    return manifest


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    return write(tmp_path_factory.mktemp("main"))


def kept(main, **rules):
    return open_data(Data(train=main.root, **rules)).kept.tolist()


def plain_hash(key, purpose, seed):
    digest = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little"), person=purpose).digest()
    return int.from_bytes(digest, "little")


def test_held_out_and_rest_are_complements_by_the_hash_of_the_key(main):
    keys = [key for key in keys_of(main).tolist()]
    for share, seed in ((0.1, 0), (0.3, 0), (0.3, 7)):
        out = kept(main, held_out=HeldOut(part="held_out", share=share, seed=seed))
        rest = kept(main, held_out=HeldOut(part="rest", share=share, seed=seed))
        assert sorted(out + rest) == list(range(COUNT)) and not set(out) & set(rest)
        assert out == [i for i, key in enumerate(keys) if plain_hash(key, b"held out", seed) < share * 2**64]
        assert abs(len(out) - share * COUNT) < 4 * (share * (1 - share) * COUNT) ** 0.5
    small = kept(main, held_out=HeldOut(part="held_out", share=0.1))
    large = kept(main, held_out=HeldOut(part="held_out", share=0.3))
    assert set(small) < set(large) != set(kept(main, held_out=HeldOut(part="held_out", share=0.3, seed=7)))


def test_what_is_held_out_does_not_move_with_order_shards_or_further_samples(main, tmp_path):
    rule = HeldOut(part="held_out", share=0.3)
    own = {bytes(k) for k in keys_of(main)[kept(main, held_out=rule)]}
    more = write(tmp_path, [7, 130, 163])  # keys go on: the first 200 are the same
    found = {bytes(k) for k in keys_of(more)[kept(more, held_out=rule)]}
    assert found > own and found & set(keys_of(main).tolist()) == own


def test_so_many_of_each_class_are_nested_and_drawn_evenly(main):
    labels = np.array([label_of(i) for i in range(COUNT)])
    keys = keys_of(main).tolist()
    parts = [kept(main, by_label=ByLabel(per_class=n, seed=3)) for n in (1, 5, 10)]
    for n, part in zip((1, 5, 10), parts, strict=True):
        assert np.bincount(labels[part]).tolist() == [n] * 5
        for number in range(5):  # those with the smallest hashes, by brute force
            own = sorted(np.flatnonzero(labels == number), key=lambda i: plain_hash(keys[i], b"by label", 3))
            assert set(own[:n]) == {i for i in part if labels[i] == number}
    assert set(parts[0]) < set(parts[1]) < set(parts[2])
    assert set(parts[1]) != set(kept(main, by_label=ByLabel(per_class=5, seed=4)))
    # Which are held out says nothing of which are drawn: with one hash for both, none or all would be.
    out = set(kept(main, held_out=HeldOut(part="held_out", share=0.5, seed=3)))
    assert 15 < len(out & set(parts[2])) < 35


def test_so_many_in_all_and_fewer_classes(main):
    labels = np.array([label_of(i) for i in range(COUNT)])
    some = [kept(main, by_label=ByLabel(samples=n)) for n in (20, 120)]
    assert [len(part) for part in some] == [20, 120] and set(some[0]) < set(some[1])
    assert np.bincount(labels[some[1]])[0] > 30  # as frequent as they are, not as many of each
    only = kept(main, by_label=ByLabel(classes=["c4", "c1"]))
    assert only == np.flatnonzero(np.isin(labels, [1, 4])).tolist()
    assert only == kept(main, by_label=ByLabel(without=["c0", "c2", "c3"]))
    few = kept(main, by_label=ByLabel(per_class=15, without=["c4"], seed=1))
    assert np.bincount(labels[few], minlength=5).tolist() == [15, 15, 15, 15, 0]
    assert np.isin(labels[kept(main, by_label=ByLabel(samples=60, classes=["c0"]))], [0]).all()


def test_few_labels_come_from_what_the_other_rules_leave(main):
    rest = set(kept(main, held_out=HeldOut(part="rest", share=0.4)))
    few = kept(main, held_out=HeldOut(part="rest", share=0.4), by_label=ByLabel(per_class=3))
    assert len(few) == 15 and set(few) < rest


def test_a_part_trains_alike_at_any_number_of_ranks_and_is_not_resumed_as_another(main):
    data = Data(
        train=main.root, fields=("label",), by_label=ByLabel(per_class=8), workers=0, tail="endless",
        held_out=HeldOut(part="rest"),
    )  # fmt: skip

    def opened(data, rank=0, world=1):
        shape = {"global_batch": 8, "micro_batch": 8 // world, "rank": rank, "world": world}
        return open_stream(data, open_data(data), seed=5, **shape)

    whole = [batch["label"] for batch, *_ in itertools.islice(opened(data).batches(0), 5)]
    parts = [[batch["label"] for batch, *_ in itertools.islice(opened(data, r, 2).batches(0), 5)] for r in (0, 1)]
    assert torch.bincount(torch.cat(whole)).tolist() == [8] * 5
    assert all(torch.equal(w, torch.cat([a, b])) for w, a, b in zip(whole, *parts, strict=True))
    state = json.loads(json.dumps(opened(data).state(2)))
    assert state["held_out"] == "rest of 0.1, seed 0" and state["by_label"] == "8 per class, seed 0"
    opened(data, 1, 2).check(state)
    for message, change in {
        "by_label: checkpoint '8 per class, seed 0', now '9 per": {"by_label": ByLabel(per_class=9)},
        "by_label: checkpoint .*, now '8 per class, seed 0, without c4'": {
            "by_label": ByLabel(per_class=8, without=["c4"])
        },
        "held_out: checkpoint .*, now 'rest of 0.2, seed 0'": {"held_out": HeldOut(part="rest", share=0.2)},
        "held_out: checkpoint .*, now None": {"held_out": None},
    }.items():
        with pytest.raises(CheckpointError, match=message):
            opened(data.model_copy(update=change)).check(state)


def test_evaluations_and_mixed_sources_take_parts_too(main):
    rules = {"held_out": HeldOut(part="held_out", share=0.4), "by_label": ByLabel(per_class=2)}
    few = kept(main, **rules)
    stream = open_eval(EvalData(path=main.root, **rules), Image(size=8), fields=("label",), batch=4, workers=0)
    found = torch.cat([batch["label"] for batch in stream])
    assert found.tolist() == [label_of(i) for i in few]
    assert str(EvalData(path="x", **rules)) == "x, held_out of 0.4, seed 0, 2 per class, seed 0"
    sources = (Source(path=main.root, **rules), Source(path=main.root, where=None))
    assert open_data(Data(train=sources)).samples == 10 + COUNT
    with pytest.raises(ValidationError, match="by_label is of one data set; write it beside each path"):
        Data(train=sources, by_label=ByLabel(per_class=2))
    assert Data(train=sources).chosen and Data(train="x", by_label=ByLabel(per_class=1)).chosen


def test_what_is_refused(main, tmp_path):
    def refused(error, message, manifest=main, **rule):
        with pytest.raises(error, match=message):
            open_data(Data(train=manifest.root, by_label=ByLabel(**rule)))

    fewer = r"data\.by_label\.per_class: 11 samples of each class asked for, but there are fewer of c4 \(10\); ask"
    refused(DataError, fewer, per_class=11)
    refused(DataError, r"fewer of c3 \(20\), c4 \(10\); ask", per_class=21)
    refused(DataError, r"data\.by_label\.samples: 201 samples asked for, there are 200; ask", samples=201)
    refused(DataError, r"samples: 11 samples asked for, there are 10", samples=11, classes=["c4"])
    refused(ConfigError, r"data\.by_label\.without: no class 'c44'; did you mean 'c4'", without=["c44"])
    refused(ConfigError, r"data\.by_label\.classes: no class 'dog'; there are c0, c1, c2, c3, c4$", classes=["dog"])
    unnamed = write(tmp_path / "unnamed", [40], classes=())
    refused(ConfigError, "no class 'c0'; there are no names", unnamed, classes=["c0"])
    assert len(kept(unnamed, by_label=ByLabel(per_class=2))) == 10  # numbers do where there are no names
    more = write(tmp_path / "more", [40], classes=(*CLASSES, "never"))
    refused(DataError, r"fewer of never \(0\); ask for less, or leave such classes out", more, per_class=1)
    bad = write_data(tmp_path, [3], lambda n: {"cls": b"x" if n == 1 else b"0", "txt": b"a"}, FIELDS)
    refused(DataError, r"sample '000001': label b'x' is not a number", bad, per_class=1)
    (tmp_path / "lacks").mkdir()
    lacks = write_data(tmp_path / "lacks", [3], lambda n: {"txt": b"a"} | ({"cls": b"0"} if n else {}), FIELDS)
    refused(DataError, r"sample '000000'.*label", lacks, per_class=1)
    (tmp_path / "none").mkdir()
    none = write_data(tmp_path / "none", [3], lambda n: {"txt": b"a"}, {"caption": ("txt",)})
    refused(DataError, "has no labels, only caption", none, per_class=1)
    for values, message in {
        (("per_class", 1), ("samples", 2)): "both say how many",
        (("classes", ("a",)), ("without", ("b",))): "both say which",
        (("seed", 1),): "nothing is chosen",
    }.items():
        with pytest.raises(ValidationError, match=message):
            ByLabel(**dict(values))
    for share in (0, 1):
        with pytest.raises(ValidationError):
            HeldOut(part="rest", share=share)
