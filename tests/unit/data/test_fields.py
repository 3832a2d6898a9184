"""Each field against what was stored: values, crops, padding, and what is refused."""

import io
import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from pipeline.config.schema import Component, Data, Image
from pipeline.core.errors import ConfigError
from pipeline.data.decode import ImageDecoder, nearest
from pipeline.data.fields.mask import read_mask
from pipeline.data.fields.vector import converted, read_npy
from pipeline.data.stream import open_stream
from tests.unit.data.shards import encode, picture
from tests.unit.data.wide import members, npy, png, vector_of, wide_data, write_wide

COUNT = 12
ALL = ("image", "label", "labels", "mask", "metadata", "text", "texts", "vector")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_wide(tmp_path_factory.mktemp("wide"), [5, 0, 7])


def stream_of(manifest, fields, settings=None, *, batch=COUNT, **more):
    data = wide_data(manifest, fields, settings, tail="endless", **more)
    return open_stream(data, manifest, seed=2, global_batch=batch, micro_batch=batch // 2, rank=0, world=1)


def epoch_of(manifest, fields, settings=None, steps=1, **more):
    """All samples in the order of their ids, over some epochs."""
    stream = stream_of(manifest, fields, settings, **more)
    parts = [part for step in itertools.islice(stream.batches(0), steps) for part in step]
    stream.close()
    batch = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = torch.argsort(batch["epoch"] * COUNT + batch["id"])
    return {key: value[order] for key, value in batch.items()}


def test_all_fields_of_a_stream(wide):
    batch = epoch_of(wide, ALL)
    assert batch["label"].tolist() == [i % 7 for i in range(COUNT)]
    assert torch.equal(batch["vector"], torch.tensor(np.stack([vector_of(i) for i in range(COUNT)])))
    assert batch["metadata"].dtype == torch.float64
    assert batch["metadata"].tolist() == [[i / 10, 20 + i] for i in range(COUNT)]
    labels = torch.zeros(COUNT, 7, dtype=torch.uint8)
    for i in range(COUNT):
        labels[i, [i % 7, 6]] = 1
    assert torch.equal(batch["labels"], labels)
    assert batch["texts"].shape == (COUNT, 3, 8) and batch["texts_mask"].dtype == torch.bool
    for i in range(COUNT):
        assert batch["texts_mask"][i].tolist() == [True, i % 2 == 1, False]
        assert batch["texts_length"][i].tolist() == [4, 6 if i % 2 else 0, 0]
        assert batch["texts"][i, 0].tolist() == [1, 4, 6, 2, 0, 0, 0, 0]
        assert batch["texts"][i, 1].tolist() == ([1, 7, 4, 5, 8, 2, 0, 0] if i % 2 else [0] * 8)
        assert (batch["texts"][i, 2] == 0).all()


def test_workers_give_the_same(wide):
    here, there = epoch_of(wide, ALL), epoch_of(wide, ALL, workers=2)
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)


def coordinates(number, size=(24, 20)):
    """A picture and a mask that both tell where a pixel came from: red is its row, green its column."""
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    pixels = np.stack([y * 8, x * 8, np.full_like(y, number)], -1).astype(np.uint8)
    return {"png": encode(pixels), "mask.png": png((y // 2 * 16 + x // 2).astype(np.uint8))}


@pytest.mark.parametrize("more", [{}, {"views": 2}, {"crops": [{"count": 2}, {"count": 3, "size": [5, 6]}]}], ids=str)
def test_masks_are_cropped_and_mirrored_with_their_images(tmp_path, more):
    """Against a picture that holds coordinates: the mask has the value of the pixel that the image shows there."""
    manifest = write_wide(tmp_path, [COUNT], coordinates)
    # Crops of the size of the picture's pixels, so that interpolation does not hide where a pixel came from.
    image = Image(**({"size": (20, 16), "scale": (0.3, 1.0)} | more))
    batch = epoch_of(manifest, ("image", "mask"), image=image, steps=2)
    names = [name for name in batch if name.startswith("image")]
    assert len(names) == len(image.each)
    mirrored = moved = 0
    for name in names:
        pixels, mask = batch[name].double(), batch[name.replace("image", "mask")]
        assert mask.dtype == torch.uint8 and mask.shape == (2 * COUNT, *pixels.shape[2:])
        row, column = pixels[:, 0] / 8, pixels[:, 1] / 8
        inner = (slice(None), slice(1, -1), slice(1, -1))  # at the edges the bicubic filter is cut
        assert ((mask // 16 * 2 + 0.5 - row)[inner].abs() < 1.3).all()
        assert ((mask % 16 * 2 + 0.5 - column)[inner].abs() < 1.3).all()
        mirrored += int((column[:, 3, 0] > column[:, 3, -1]).sum())
        moved += int((row[:, 0, 2] > 1.5).sum())
    assert 5 < mirrored < 2 * COUNT * len(names) - 5 and moved > 3


@pytest.mark.parametrize("crop", ["center", "resize"])
def test_masks_of_the_crops_of_evaluation(tmp_path, crop):
    manifest = write_wide(tmp_path, [COUNT], coordinates)
    batch = epoch_of(manifest, ("image", "mask"), image=Image(size=(12, 12), crop=crop))
    row, column = batch["image"][:, 0].double() / 8, batch["image"][:, 1].double() / 8
    assert ((batch["mask"] // 16 * 2 + 0.5 - row).abs() < 1.6).all()
    assert ((batch["mask"] % 16 * 2 + 0.5 - column).abs() < 1.6).all()


def test_nearest_values_are_those_of_pillow():
    """And a mask is never interpolated: no value is new."""
    values = np.random.default_rng(0).integers(0, 256, (37, 23)).astype(np.uint8)
    for shape in ((11, 9), (64, 50), (37, 23), (1, 1)):
        ours = nearest(torch.from_numpy(values)[None], shape)[0].numpy()
        theirs = np.asarray(PillowImage.fromarray(values).resize(shape[::-1], PillowImage.Resampling.NEAREST))
        assert np.array_equal(ours, theirs)


def test_a_mask_without_its_image_has_the_same_crops(wide):
    image = Image(size=8, views=2)
    both, alone = (epoch_of(wide, fields, image=image) for fields in (("image", "mask"), ("mask",)))
    assert torch.equal(both["mask"], alone["mask"]) and torch.equal(both["mask2"], alone["mask2"])


def test_what_a_mask_may_be():
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = write_palette(values)
    assert np.array_equal(read_mask(memoryview(palette), np.dtype(np.uint8)), values)
    deep = png(values.astype(np.uint16) + 1000)
    assert np.array_equal(read_mask(memoryview(deep), np.dtype(np.int32)), values.astype(np.int32) + 1000)
    with pytest.raises(ValueError, match="a mask with the value 1011; 8 bits hold 255"):
        read_mask(memoryview(deep), np.dtype(np.uint8))
    with pytest.raises(ValueError, match="a mask in colours"):
        read_mask(memoryview(encode(picture(0))), np.dtype(np.uint8))
    with pytest.raises(ValueError, match="none of PNG, TIFF, BMP, GIF"):
        read_mask(memoryview(encode(picture(0), "jpg")), np.dtype(np.uint8))


def write_palette(values):
    image = PillowImage.new("P", values.shape[::-1])
    image.putpalette([(5 * i) % 256 for i in range(768)])
    image.frombytes(values.tobytes())
    target = io.BytesIO()
    image.save(target, "PNG")
    return target.getvalue()


def bad(tmp_path, make, fields, settings=None):
    """Reasons for which samples of a data set were replaced."""
    manifest = write_wide(tmp_path, [COUNT], lambda n: members(n) | (make if n == 3 else {}))
    stream = stream_of(manifest, fields, settings, max_bad=1)
    batch = [part["id"].tolist() for part in next(stream.batches(0))]
    (line,) = stream.ledger()
    assert line["id"] == 3 and 3 not in [i for part in batch for i in part]
    stream.close()
    return line["reason"]


BAD = {
    "mask size": (
        {"mask.png": png(np.zeros((9, 9), np.uint8))},
        "mask",
        "field 'mask.png': a mask of 9 x 9 pixels for ",
    ),
    "no key": ({"json": b'{"a": 1}'}, "labels", "field 'metadata': no key 'labels', only 'a'"),
    "class": ({"json": b'{"labels": [7]}'}, "labels", "field 'metadata': label '7' is not one of the 7 classes"),
    "truth": ({"json": b'{"labels": [true]}'}, "labels", "label 'True' is not one of the 7 classes"),
    "name": ({"json": b'{"labels": ["c9"]}'}, "labels", "label 'c9' is not one of the 7 classes"),
    "text": ({"json": b'{"score": "high"}'}, "metadata", "field 'metadata': 'score' is 'high', not a number"),
    "nan": ({"json": b'{"score": NaN}'}, "metadata", "it has no number 'score'"),
    "no number": ({"json": b'{"score": 1}'}, "metadata", "it has no number 'size.width'"),
    "shape": ({"npy": npy(np.zeros(5, np.float32))}, "vector", "field 'npy': an array of [5], not of [4]"),
    "infinite": ({"npy": npy(np.array([1, 2, np.inf, 4]))}, "vector", "a number in it is not finite"),
    "large": ({"npy": npy(np.full(4, 1e300))}, "vector", "a number in it is too large for float32"),
    "object": ({"npy": npy(np.array([1, None, 2, 3], dtype=object))}, "vector", "an array of object, not of numbers"),
    "empty": ({"txt": b" ", "1.txt": b"\n"}, "texts", "field 'texts': no caption that is not empty"),
    "latin-1": ({"txt": b"caf\xe9"}, "texts", "field 'caption': not UTF-8"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_sample_is_replaced_and_says_why(tmp_path, case):
    make, field, reason = BAD[case]
    assert reason in bad(tmp_path, make, ("image", field) if field == "mask" else (field,))


def test_a_number_that_is_missing_may_have_a_value(tmp_path):
    manifest = write_wide(tmp_path, [COUNT], lambda n: members(n) | ({"json": b'{"score": null}'} if n == 3 else {}))
    batch = epoch_of(manifest, ("metadata",), {"metadata": {"missing": -1.0}})
    assert batch["metadata"][3].tolist() == [-1.0, -1.0] and batch["metadata"][4].tolist() == [0.4, 24.0]


def test_captions_of_a_table_and_of_lines(tmp_path):
    def make(number):
        table = {"captions": ["a cat", " ", "a red cat"] if number % 2 else "a cat"}
        return {"json": json.dumps(table).encode(), "txt": b"a cat\na red cat\n\n"}

    manifest = write_wide(tmp_path, [COUNT], make)
    batch = epoch_of(manifest, ("texts",), {"texts": {"key": "captions", "count": 2}})
    assert batch["texts_length"].tolist() == [[4, 5 if i % 2 else 0] for i in range(COUNT)]
    batch = epoch_of(manifest, ("texts",), {"texts": {"members": ["caption"], "lines": True, "count": 3}})
    assert batch["texts_length"].tolist() == [[4, 5, 0]] * COUNT


def test_more_captions_than_wanted_are_counted(wide):
    stream = stream_of(wide, ("texts",), {"texts": {"count": 1}})
    next(stream.batches(0))
    assert stream.events()["left_out_texts"] == sum(i % 2 for i in range(COUNT))
    stream.close()


def test_multi_hot_labels_in_other_members(tmp_path):
    forms = [b"1, 3", b"1 3\n", b"[1, 3]", b'["c1", "c3"]', b'{"labels": [3, 1, 1]}', b"[]"]
    manifest = write_wide(tmp_path, [COUNT], lambda n: {"npy": forms[n % len(forms)]})
    batch = epoch_of(manifest, ("labels",), {"labels": {"member": "npy"}})
    for i in range(COUNT):
        assert batch["labels"][i].nonzero().flatten().tolist() == ([] if i % len(forms) == 5 else [1, 3])


def test_vectors_of_other_types():
    stored = np.asfortranarray(np.arange(6).reshape(2, 3))
    assert np.array_equal(read_npy(memoryview(npy(stored)), (2, 3)), stored)
    big = np.array([2**40, -1])
    assert converted(big, np.dtype(np.int64)).tolist() == [2**40, -1]
    with pytest.raises(ValueError, match="too large for int32"):
        converted(big, np.dtype(np.int32))
    with pytest.raises(ValueError, match="no whole ones"):
        converted(np.array([1.5]), np.dtype(np.int64))
    with pytest.raises(ValueError, match="bytes of numbers, which is not what its header says"):
        read_npy(memoryview(npy(np.zeros(4)))[:-1], (4,))


def test_several_fields_of_one_kind(wide):
    own = {"teacher": {"name": "vector", "size": 4}, "other": {"name": "vector", "size": 4, "dtype": "float16"}}
    batch = epoch_of(wide, ("teacher", "other"), own)
    assert batch["teacher"].dtype == torch.float32 and batch["other"].dtype == torch.float16
    assert torch.equal(batch["teacher"].half(), batch["other"])


def test_settings_that_do_not_fit(wide):
    def refused(message, fields, settings=None, manifest=wide):
        with pytest.raises(ConfigError, match=message):
            stream_of(manifest, fields, settings)

    refused(r"data\.field\.teacher\.size: missing", ("teacher",), {"teacher": {"name": "vector"}})
    refused(r"data\.field\.teacher\.sise: unknown key", ("teacher",), {"teacher": {"name": "vector", "sise": 4}})
    refused(r"data\.field\.texts: with a key", ("texts",), {"texts": {"key": "a", "lines": True}})
    refused(r"data\.field\.labels\.classes: a name stands twice", ("labels",), {"labels": {"classes": ["a", "a"]}})
    refused(
        r"data\.field\.vector\.member: .* has no field 'no\.npy', only", ("vector",), {"vector": {"member": "no.npy"}}
    )
    refused(
        r"data\.fields: 'text_length' and 'text' both have a column 'text_length'",
        ("text", "text_length"),
        {"text_length": {"name": "label"}},
    )
    with pytest.raises(ValueError, match=r"field\.teacher sets a field that is not wanted"):
        Data(train=wide.root, field={"teacher": Component(name="vector", size=4)})


CROPS = [{"count": 2, "scale": (0.4, 1.0)}, {"count": 6, "size": (6, 5), "scale": (0.05, 0.4), "flip": False}]


def test_crops_of_several_kinds(wide):
    """Two large ones and six small ones, each as it would be alone."""
    image = Image(size=8, crops=CROPS)
    batch = epoch_of(wide, ("image",), image=image)
    names = [name for name in batch if name.startswith("image")]
    assert names == ["image", *(f"image{i}" for i in range(2, 9))]
    assert [tuple(batch[name].shape[2:]) for name in names] == [(8, 8)] * 2 + [(6, 5)] * 6
    assert len({batch[name][3].numpy().tobytes() for name in names}) == 8
    # The first two are the two views that there are without the others.
    two = epoch_of(wide, ("image",), image=Image(size=8, views=2, scale=(0.4, 1.0)))
    assert all(torch.equal(batch[name], two[name]) for name in ("image", "image2"))


def test_small_crops_show_less_and_the_image_is_decoded_once(monkeypatch):
    opened = []

    class Stored:
        size = (240, 200)

        def window(self, box):
            opened.append(box)
            y, x = torch.meshgrid(torch.arange(box.height), torch.arange(box.width), indexing="ij")
            return torch.stack([y + box.top, x + box.left, x]).to(torch.uint8)

    decoder = ImageDecoder(Image(size=8, crops=CROPS), 0)
    ids = torch.arange(40)
    spread = torch.zeros(8)
    for drawn in decoder.geometry(torch.zeros_like(ids), ids):
        views = decoder.views(Stored(), drawn)
        spread += torch.stack([v[0].float().amax() - v[0].float().amin() for v in views]) / 40
        assert not any(view.mirror for view in drawn[2:])
    assert len(opened) == 40
    assert spread[:2].min() > 1.25 * spread[2:].max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": "center"}, "crops are random, so they do not go with crop = 'center'"),
        ({"views": 2}, "'views' counts crops of one kind"),
        ({"size": 16, "crops": [{"size": 8}]}, r"crops\[0\]\.size is 8, but size is 16"),
        ({"crops": [{"scale": (0.5, 0.2)}]}, "scale goes from 0.5 down to 0.2"),
    ],
)
def test_crops_that_do_not_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        Image(**({"size": 8, "crops": CROPS} | settings))
