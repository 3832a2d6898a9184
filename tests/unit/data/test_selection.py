"""Parts of a data set and sidecars: which samples there are, what they hold, and what is refused."""

import io
import itertools
import json

import numpy as np
import pytest
import torch

from pipeline.config.parts import ByLabel, HeldOut
from pipeline.config.schema import Beside, Captions, Component, Data, Image, Sidecar, Source
from pipeline.core.errors import CheckpointError, ConfigError, DataError
from pipeline.data.dataset import numbers_of, open_data
from pipeline.data.stream import open_stream
from tests.unit.data.shards import Manifest, save, write_data, write_shard
from tests.unit.data.wide import FIELDS, write_wide

SIZES = [5, 0, 9, 1, 9]
COUNT = sum(SIZES)
SIDE = {"caption": ("txt",), "npy": ("npy",), "metadata": ("json",)}


def npy(value):
    target = io.BytesIO()
    np.save(target, value)
    return target.getvalue()


def shuffled(number):
    """The number in the main data set of the side's sample: keys are in another order there."""
    return (number * 7 + 3) % COUNT


@pytest.fixture(scope="module")
def main(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("main"), SIZES)


def write_side(folder, only=range(COUNT), make=None):
    """A data set of fields whose samples have the main one's keys, in another order and in other shards."""

    def own(number):
        table = {"score": number / COUNT, "lang": "en" if number % 3 else "de"}
        return {"npy": npy(np.float32([number, -number])), "json": json.dumps(table).encode(), "txt": b"a red cat"}

    folder.mkdir(parents=True, exist_ok=True)
    numbers = [n for n in map(shuffled, range(COUNT)) if n in only]
    shards = []
    for i, part in enumerate((numbers[:7], numbers[7:])):
        samples = [(f"{n:06d}", (make or own)(n)) for n in part]
        shards.append(write_shard(folder / f"side-{i:06d}.tar", samples, SIDE))
    manifest = Manifest(str(folder), tuple(shards), dict(SIDE))
    save(manifest, folder)
    return manifest


@pytest.fixture(scope="module")
def side(tmp_path_factory):
    return write_side(tmp_path_factory.mktemp("side"))


TEACHER = {"teacher": Component(name="vector", member="extra:npy", size=2)}


def data_of(main, fields=("label",), **more):
    more = {"image": Image(size=8), "captions": Captions(length=8), "workers": 0, "tail": "endless"} | more
    return Data(train=main.root, fields=fields, **more)


def open_it(data, *, rank=0, world=1, batch=8):
    shape = {"global_batch": batch, "micro_batch": batch // world, "rank": rank, "world": world}
    return open_stream(data, open_data(data), seed=5, **shape)


def batches(data, steps, first=0, world=1, batch=8):
    """Global batches, put together from all ranks."""
    parts = []
    for rank in range(world):
        stream = open_it(data, rank=rank, world=world, batch=batch)
        parts.append(list(itertools.islice(stream.batches(first), steps)))
        stream.close()
    return [{key: torch.cat([part[step][0][key] for part in parts]) for key in parts[0][0][0]} for step in range(steps)]


def write_list(folder, lines):
    (folder / "ids.txt").write_text("".join(f"{line}\n" for line in lines))
    return str(folder / "ids.txt")


def same(left, right):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(left, right, strict=True)
    )


KEPT = [0, 3, 4, 6, 7, 11, 13, 14, 15, 20, 23]


@pytest.mark.parametrize("form", ["keys", "numbers"])
def test_a_list_of_samples(main, tmp_path, form):
    lines = [f"{i:06d}" if form == "keys" else str(i) for i in reversed(KEPT)]
    data = data_of(
        main,
        ("label", "metadata"),
        keep=write_list(tmp_path, lines),
        field={"metadata": Component(name="metadata", columns=["size.width"])},
    )
    manifest = open_data(data)
    assert manifest.samples == len(KEPT) and manifest.fingerprint != main.fingerprint
    assert [s.samples for s in manifest.shards] == [
        sum(low <= i < high for i in KEPT) for low, high in ((0, 5), (5, 14), (14, 15), (15, 24))
    ]
    (epoch,) = batches(data, 1, batch=len(KEPT))
    # Numbered anew in their order; each is the sample that the list names.
    order = torch.argsort(epoch["id"])
    assert epoch["id"][order].tolist() == list(range(len(KEPT)))
    assert (epoch["metadata"][order, 0] - 20).tolist() == KEPT


def test_a_part_is_the_same_data_set_for_all_ranks_and_resumed(main, tmp_path):
    data = data_of(main, ("image", "label"), keep=write_list(tmp_path, KEPT))
    whole = batches(data, 4)
    assert same(whole, batches(data, 4, world=4))
    assert same(whole[2:], batches(data, 2, first=2, world=2))
    assert same(whole, batches(data.model_copy(update={"workers": 2}), 4))


def test_a_condition_on_the_metadata(main):
    """Against the condition in Python."""
    data = data_of(
        main,
        ("metadata",),
        where="score > 0.3 and `size.width` != 27",
        field={"metadata": Component(name="metadata", columns=["size.width"])},
    )
    manifest = open_data(data)
    expected = [i for i in range(COUNT) if i / 10 > 0.3 and 20 + i != 27]
    assert manifest.kept.tolist() == expected
    (epoch,) = batches(data, 1, batch=len(expected))
    assert sorted((epoch["metadata"][:, 0] - 20).tolist()) == expected


def test_a_sidecar_is_joined_by_key(main, side):
    data = data_of(
        main,
        ("label", "teacher", "text"),
        sidecar={"extra": Sidecar(path=side.root)},
        field=TEACHER,
        captions=Captions(length=8, fields={"extra:caption": 1.0}),
    )
    for world in (1, 2):
        for batch in batches(data, 4, world=world):
            ids = batch["id"].float()
            assert torch.equal(batch["teacher"], torch.stack([ids, -ids], 1))
            assert torch.equal(batch["label"], batch["id"] % 7)
            assert (batch["text_length"] == 5).all()
    assert same(batches(data, 3), batches(data.model_copy(update={"workers": 2}), 3))


def test_a_sidecar_alone(main, side):
    data = data_of(main, ("teacher",), sidecar={"extra": Sidecar(path=side.root)}, field=TEACHER)
    (batch,) = batches(data, 1)
    assert torch.equal(batch["teacher"][:, 0], batch["id"].float())


def test_a_condition_on_a_sidecar(main, side):
    data = data_of(
        main, sidecar={"extra": Sidecar(path=side.root)}, where='`extra:score` >= 0.5 and `extra:lang` == "en"'
    )
    assert open_data(data).kept.tolist() == [i for i in range(COUNT) if i / COUNT >= 0.5 and i % 3]


def test_samples_that_a_sidecar_does_not_know(main, tmp_path):
    absent = {2, 9, 17}
    side = write_side(tmp_path, [i for i in range(COUNT) if i not in absent])

    def data(missing, fields=("label", "teacher"), field=TEACHER):
        sidecar = {"extra": Sidecar(path=side.root, missing=missing)}
        return data_of(main, fields, sidecar=sidecar, field=field, max_bad=1.0)

    with pytest.raises(DataError, match=r"sidecar\.extra: 3 of 24 samples .* first '000002', '000009', '000017'; add"):
        open_data(data("refuse"))
    assert open_data(data("drop")).kept.tolist() == [i for i in range(COUNT) if i not in absent]
    stream = open_it(data("allow"))
    delivered = [i for step in itertools.islice(stream.batches(0), 3) for i in step[0]["id"].tolist()]
    assert not absent & set(delivered)
    lines = stream.ledger()
    assert {line["id"] for line in lines} == absent
    assert all("it has no 'extra:npy': a sidecar does not know its key" in line["reason"] for line in lines)
    stream.close()
    # A field that can do without the sidecar takes what there is.
    captions = Captions(length=8, fields={"caption": 1e-9, "extra:caption": 1.0})
    mixed = data("allow", ("text",), {}).model_copy(update={"captions": captions})
    lengths = {
        i: n for b in batches(mixed, 3) for i, n in zip(b["id"].tolist(), b["text_length"].tolist(), strict=True)
    }
    assert lengths == {i: 4 if i in absent else 5 for i in range(COUNT)}


PARTS = {
    "where": lambda manifest: {"where": "`size.width` < 32"},
    "held_out": lambda manifest: {"held_out": HeldOut(part="rest", share=0.4)},
    "by_label": lambda manifest: {"by_label": ByLabel(per_class=2, seed=1)},
    "samples": lambda manifest: {"by_label": ByLabel(samples=9)},
}


@pytest.mark.parametrize("rule", PARTS)
def test_a_sidecar_answers_for_the_samples_of_the_part_alone(main, tmp_path, rule):
    part = data_of(main, ("label", "teacher"), field=TEACHER, **PARTS[rule](main))
    kept = open_data(part).kept.tolist()
    assert 0 < len(kept) < COUNT
    whole = write_side(tmp_path / "whole")
    exact = write_side(tmp_path / "exact", kept)
    for side in (whole, exact):
        joined = part.model_copy(update={"sidecar": {"extra": Sidecar(path=side.root)}})
        assert open_data(joined).kept.tolist() == kept
        (batch,) = batches(joined, 1, batch=len(kept))
        assert sorted(batch["teacher"][:, 0].tolist()) == kept
    lacking = write_side(tmp_path / "lacking", kept[1:])
    with pytest.raises(DataError, match=rf"extra: 1 of {len(kept)} samples .* first '{kept[0]:06d}'; add"):
        open_data(part.model_copy(update={"sidecar": {"extra": Sidecar(path=lacking.root)}}))


def test_a_condition_on_a_sidecar_needs_it_for_all_that_it_judges(main, tmp_path):
    """Those that a later rule would have left out, too: whether the condition holds for them decides who is drawn."""
    side = write_side(tmp_path, range(1, COUNT))
    data = data_of(main, sidecar={"extra": Sidecar(path=side.root)}, where="`extra:score` >= 0.5")
    few = data.model_copy(update={"by_label": ByLabel(samples=2)})
    for one in (data, few):
        with pytest.raises(DataError, match=r"extra: 1 of 24 samples .* first '000000'"):
            open_data(one)


def test_a_key_that_stands_twice_outside_of_the_part_harms_nothing(main, side, tmp_path):
    samples = [(f"{n:06d}", {"cls": b"1"}) for n in (0, 1, 2, 1)]
    shard = write_shard(tmp_path / "x-000000.tar", samples, {"label": ("cls",)})
    twice = Manifest(str(tmp_path), (shard,), {"label": ("cls",)})
    save(twice, tmp_path)
    sidecar = {"extra": Sidecar(path=side.root)}
    part = data_of(twice, keep=write_list(tmp_path, [0, 2]), sidecar=sidecar)
    assert open_data(part).kept.tolist() == [0, 2]
    for data in (data_of(twice, sidecar=sidecar), data_of(twice, keep=write_list(tmp_path, [1, 3]), sidecar=sidecar)):
        with pytest.raises(DataError, match="the key '000001' stands for several samples"):
            open_data(data)


def test_another_part_or_sidecar_is_not_resumed(main, side, tmp_path):
    sidecar = {"extra": Sidecar(path=side.root)}
    data = data_of(main, sidecar=sidecar, where="score > 0.3")
    state = json.loads(json.dumps(open_it(data).state(3)))
    assert state["sidecar.extra"] == side.fingerprint and state["where"] == "score > 0.3" and state["samples"] == 20
    open_it(data, rank=1, world=2).check(state)
    other = write_side(tmp_path, make=lambda n: {"npy": npy(np.float32([0, 0])), "json": b"{}", "txt": b"a"})
    changes = {
        "where: checkpoint 'score > 0.3', now 'score > 0.4'": {"where": "score > 0.4"},
        "where: checkpoint 'score > 0.3', now None": {"where": None},
        "keep: checkpoint None, now '11 of 24": {"keep": write_list(tmp_path, KEPT)},
        "sidecar.extra: checkpoint": {"sidecar": {"extra": Sidecar(path=other.root)}},
    }
    for message, change in changes.items():
        with pytest.raises(CheckpointError, match=message):
            open_it(data.model_copy(update=change), batch=4).check(state)
    # Two lists of equal length are told apart, too.
    first, second = (data_of(main, keep=write_list(tmp_path, lines)) for lines in (KEPT,) * 2)
    state = open_it(first).state(0)
    write_list(tmp_path, [*KEPT[:-1], 22])
    with pytest.raises(CheckpointError, match="manifest: checkpoint"):
        open_it(second).check(state)


def test_without_parts_and_sidecars_nothing_is_new(main):
    assert open_data(data_of(main)) == main
    assert set(open_it(data_of(main)).state(0)) == {
        "step",
        "manifest",
        "seed",
        "global_batch",
        "lanes",
        "window",
        "tail",
    }


def test_parts_of_sources_and_beside(main, side, tmp_path):
    keep = write_list(tmp_path, KEPT)
    sources = (Source(path=main.root, keep=keep), Source(path=main.root, where="score < 0.5"))
    data = Data(train=sources, fields=("label",), workers=0, tail="endless")
    manifest = open_data(data)
    assert manifest.samples == len(KEPT) + 5
    found = {i: n for b in batches(data, 6) for i, n in zip(b["id"].tolist(), b["label"].tolist(), strict=True)}
    assert found == {i: n % 7 for i, n in enumerate([*KEPT, *range(5)])}
    beside = Beside(path=main.root, fields=("teacher",), where="score >= 2", sidecar={"extra": Sidecar(path=side.root)})
    data = data_of(main, beside={"other": beside}, field=TEACHER)
    batch = batches(data, 1, batch=4)[0]
    assert sorted(batch["other_teacher"][:, 0].tolist()) == [20, 21, 22, 23]


def test_what_is_refused(main, side, tmp_path):
    def refused(error, message, **more):
        with pytest.raises(error, match=message):
            open_it(data_of(main, **more))

    lines = write_list(tmp_path, ["000003", "nobody", "000004"])
    refused(DataError, r"data\.keep: 1 of 3 lines of .* are no keys of .*, first 'nobody'; write", keep=lines)
    (tmp_path / "mixed").mkdir()
    mixed = write_list(tmp_path / "mixed", ["000003", "4"])
    refused(DataError, "1 of 2 lines .* first '4'", keep=mixed)
    (tmp_path / "far").mkdir()
    refused(DataError, "1 of 2 lines .* first '24'", keep=write_list(tmp_path / "far", [3, COUNT]))
    refused(ConfigError, r"data\.keep: cannot read .*nowhere", keep=str(tmp_path / "nowhere"))
    refused(DataError, "of 24 samples of .* none is kept", where="score > 99")
    refused(ConfigError, r"data\.where score >: .*it is written like", where="score >")
    refused(DataError, r"x-000000\.tar, sample '000000': data\.where: ", where='score > "high"')
    refused(ConfigError, r"data\.where: .* has no 'extra:metadata' to look at, only image", where="`extra:score` > 1")
    refused(DataError, "no manifest at", sidecar={"extra": Sidecar(path=str(tmp_path))})
    refused(ConfigError, r"has no field 'extra:npy', only image", fields=("teacher",), field=TEACHER)
    with pytest.raises(ValueError, match="keep is of one data set; write it beside each path"):
        Data(train=(Source(path="a"),), keep="x")
    with pytest.raises(ValueError, match="sidecar joins one data set"):
        Data(train=(Source(path="a"),), sidecar={"a": Sidecar(path="b")})


def test_a_key_that_stands_twice_joins_nothing(main, tmp_path):
    twice = write_data(tmp_path, [3, 3], lambda n: {"txt": b"a"}, FIELDS)
    keys = np.array([b"b", b"a", b"c", b"a"])
    with pytest.raises(DataError, match="the key 'a' stands for several samples"):
        numbers_of(keys[:2], keys, twice.root)
    assert numbers_of(np.array([b"c", b"z", b"b"]), keys, "").tolist() == [2, -1, 0]  # nobody asks for the other two
    assert numbers_of(np.array([b"c", b"longer", b"b"]), keys[:3], "").tolist() == [2, -1, 0]


def test_a_damaged_sidecar_is_noticed(main, tmp_path):
    side = write_side(tmp_path)
    path = tmp_path / side.shards[0].name
    path.write_bytes(path.read_bytes().replace(b"NUMPY", b"NUMPX"))
    data = data_of(main, ("teacher",), sidecar={"extra": Sidecar(path=side.root)}, field=TEACHER, max_bad=1.0)
    stream = open_it(data)
    list(itertools.islice(stream.batches(0), 3))
    lines = stream.ledger()
    assert len(lines) == 7 and all("side-000000.tar" in line["shard"] and "CRC-32" in line["reason"] for line in lines)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot open shard .*side-000000\.tar"):
        open_it(data)
