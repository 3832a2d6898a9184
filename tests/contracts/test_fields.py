"""What every field promises, for each file in ``data/fields``: a new one is held to it without being listed here."""

import pickle

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError
from pipeline.data.field import Sample, kinds, make_fields
from pipeline.data.outputs import KIND
from pipeline.data.text import read_tokenizer
from tests.unit.data.wide import FIELDS, SETTINGS, members, outputs_of, wide_data, with_outputs, write_wide

B, FILLS = 6, (0, 255)
EPOCH, IDS = torch.tensor([0, 1, 0, 2, 0, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
BY_EXTENSION = {extension: name for name, extensions in FIELDS.items() for extension in extensions}

every_field = pytest.mark.parametrize("kind", kinds())


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("wide"), [B])


def field_of(manifest, kind, name=None, **more):
    name = name or kind
    own = {"name": kind} | SETTINGS.get(kind, {})
    data = wide_data(manifest, (name,), {name: own} if len(own) > 1 or name != kind else None, **more)
    if kind == KIND and set(manifest.fields) >= set(FIELDS):
        manifest = with_outputs(manifest, data)
    return make_fields(manifest, data, 3, lambda: read_tokenizer(manifest, data.captions))[name]


def stored(number):
    own = {BY_EXTENSION[e]: content for e, content in members(number).items()} | outputs_of(number)
    return {name: memoryview(bytearray(content)) for name, content in own.items()}


def decoded(field, ids, epochs, fill=0):
    """Arrays that the field has filled, which held ``fill`` before."""
    arrays = {name: np.empty((len(ids), *c.shape), c.dtype) for name, c in field.columns.items()}
    for array in arrays.values():
        array.view(np.uint8)[...] = fill % 2 if array.dtype == bool else fill
    drawn = field.draw(epochs, ids)
    assert len(drawn) == len(ids)
    for row, number in enumerate(ids.tolist()):
        own = {name: data for name, data in stored(number).items() if name in {*field.needs, *field.takes}}
        field.decode(Sample(own), drawn[row], arrays, row)
    return arrays


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[name], right[name]) for name in left)


@every_field
def test_reads_what_it_says_and_writes_every_element(wide, kind):
    """From the members that it asks for alone; nothing of what a buffer held before is left."""
    field = field_of(wide, kind)
    assert field.columns and (field.needs or field.takes)
    assert {*field.needs, *field.takes} <= {*wide.fields, *outputs_of(0)}
    first, second = (decoded(field, IDS, EPOCH, fill) for fill in FILLS)
    assert same(first, second)
    assert set(field.events) <= set(field.kinds)


@every_field
@pytest.mark.parametrize("more", [{}, {"views": 2}, {"crops": [{"count": 2}, {"count": 3, "size": 4}]}], ids=str)
def test_is_a_function_of_seed_epoch_and_sample(wide, kind, more):
    """Not of the batch, of the row, of the process, nor of what was decoded before."""
    image = {"image": {"size": 8} | more}
    field = field_of(wide, kind, **image)
    whole = decoded(field, IDS, EPOCH)
    for row in range(B):
        alone = decoded(pickle.loads(pickle.dumps(field)), IDS[row : row + 1], EPOCH[row : row + 1])
        assert all(np.array_equal(whole[name][row], alone[name][0]) for name in whole)
    assert same(whole, decoded(field_of(wide, kind, **image), IDS, EPOCH))


@every_field
def test_another_name_gives_the_same_numbers(wide, kind):
    own, other = field_of(wide, kind), field_of(wide, kind, name="another")
    assert [name.replace("another", kind) for name in other.columns] == list(own.columns)
    assert all(
        np.array_equal(a, b)
        for a, b in zip(decoded(own, IDS, EPOCH).values(), decoded(other, IDS, EPOCH).values(), strict=True)
    )


@every_field
def test_no_bytes_are_a_bug(wide, kind):
    """Whatever a member holds, the sample is decoded or bad: ValueError, never anything else."""
    field = field_of(wide, kind)
    random = np.random.default_rng(0)
    arrays = {name: np.empty((1, *c.shape), c.dtype) for name, c in field.columns.items()}
    drawn = field.draw(EPOCH[:1], IDS[:1])[0]
    bad = 0
    for trial in range(120):
        own = {name: data for name, data in stored(5).items() if name in {*field.needs, *field.takes}}
        victim = list(own)[trial % len(own)]
        content = bytearray(own[victim])
        kind_of_damage = trial % 4
        if kind_of_damage == 0:
            content = content[: random.integers(0, len(content))]
        elif kind_of_damage == 1:
            content = bytearray(random.bytes(int(random.integers(0, 40))))
        elif kind_of_damage == 2:
            for at in random.integers(0, len(content), 3):
                content[at] = random.integers(0, 256)
        else:
            content = bytearray(
                [b"", b"[]", b"{}", b"null", b"[[1]]", b'{"labels": 3}', b"\xff", b"9" * 5000][trial % 8]
            )
        own[victim] = memoryview(content)
        try:
            field.decode(Sample(own), drawn, arrays, 0)
        except ValueError as error:
            bad += 1
            assert str(error)
    assert bad > 20


@every_field
def test_a_member_that_the_data_lacks_is_named(wide, kind, tmp_path):
    bare = write_wide(tmp_path, [2], lambda n: {"other": b"x"})
    bare = type(bare)(bare.root, bare.shards, {"other": ("other",)}, bare.classes, tokenizer=bare.tokenizer)
    with pytest.raises(ConfigError, match=r"data\..*only other|no \[data\.sidecar"):
        field_of(bare, kind)


def test_an_unknown_field_names_those_there_are(wide):
    with pytest.raises(ConfigError, match=r"data\.fields: unknown field 'imag'; did you mean 'image'"):
        field_of(wide, "imag")
    with pytest.raises(
        ConfigError, match=r"data\.field\.a: unknown kind of field 'x'; there are: image, label, labels, .*vector"
    ):
        field_of(wide, "x", name="a")
