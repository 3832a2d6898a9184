"""Pixels against Pillow and torchvision, boxes against torchvision's distribution, and broken files."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from PIL import ImageOps
from scipy import stats
from torchvision import transforms

from pipeline.config.schema import Image
from pipeline.data.decode import Geometry, ImageDecoder, center, open_image, random_box
from pipeline.data.jpeg import Box
from pipeline.data.labels import decode_label

BICUBIC = transforms.InterpolationMode.BICUBIC


def file(image: PillowImage.Image, kind="JPEG", **options) -> memoryview:
    target = io.BytesIO()
    image.save(target, kind, **options)
    return memoryview(bytearray(target.getvalue()))


def stock(data: memoryview) -> PillowImage.Image:
    return PillowImage.open(io.BytesIO(data)).convert("RGB")


def photo(h=75, w=101) -> PillowImage.Image:
    """Smooth, with a little noise, as photographs are."""
    noise = np.random.default_rng(0).normal(0, 8, (h, w, 3))
    y, x = np.mgrid[0:h, 0:w] / 20
    base = np.stack([np.sin(x + i) * 60 + np.cos(y * (i + 1)) * 50 + 128 for i in range(3)], -1)
    return PillowImage.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


FILES = {
    "4:2:0": lambda p: file(p, quality=90),
    "4:4:4": lambda p: file(p, subsampling=0),
    "progressive": lambda p: file(p, progressive=True),
    "grey": lambda p: file(p.convert("L")),
    "cmyk": lambda p: file(p.convert("CMYK")),
    "png": lambda p: file(p, "PNG"),
    "png grey": lambda p: file(p.convert("L"), "PNG"),
    "png rgba": lambda p: file(p.convert("RGBA"), "PNG"),
    "png palette": lambda p: file(p.quantize(16), "PNG"),
    "webp": lambda p: file(p, "WEBP"),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("box", [Box(0, 0, 75, 101), Box(13, 35, 41, 22), Box(74, 100, 1, 1), Box(0, 7, 3, 94)])
def test_window_holds_pillows_pixels(name, box):
    data = FILES[name](photo())
    stored = open_image(data)
    assert stored.size == (75, 101)
    expected = np.asarray(stock(data))[box.top : box.top + box.height, box.left : box.left + box.width]
    np.testing.assert_array_equal(stored.window(box).permute(1, 2, 0).numpy(), expected)


def test_transparent_palette_gives_no_warning():
    image = photo().quantize(8)
    image.info["transparency"] = bytes([0, 128, 255])
    stored = open_image(file(image, "PNG", transparency=bytes([0, 128, 255])))
    assert stored.window(Box(0, 0, 75, 101)).shape == (3, 75, 101)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_images_are_turned_upright(kind, orientation):
    """Windows of them too, as Pillow turns the whole."""
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    data = file(photo(), kind, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(PillowImage.open(io.BytesIO(data))))
    stored = open_image(data)
    assert stored.size == expected.shape[:2]
    for box in (Box(0, 0, *stored.size), Box(13, 35, 41, 22), Box(1, 2, 3, 4)):
        found = stored.window(box).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, expected[box.top :, box.left :][: box.height, : box.width])


def test_four_colours_without_adobes_mark_are_as_pillow_reads_them():
    data = bytes(file(photo().convert("CMYK"), quality=95))
    at = data.index(b"\xff\xee")
    bare = memoryview(bytearray(data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]))
    assert PillowImage.open(io.BytesIO(bare)).mode == "CMYK"
    found = open_image(bare).window(Box(0, 0, 75, 101)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, np.asarray(stock(bare)))


def test_windows_above_the_cut_of_a_jpeg_are_no_less_broken():
    """Else a sample would be replaced in some epochs and not in others."""
    data = bytes(file(photo(400, 400), quality=95))
    with pytest.raises(ValueError, match="cut short"):
        open_image(memoryview(bytearray(data[: len(data) * 9 // 10]))).window(Box(0, 0, 8, 8))
    assert open_image(memoryview(bytearray(data + b"more behind its end"))).size == (400, 400)


PillowImage.init()
SAVE = PillowImage.SAVE
"""What this Pillow can write."""
JPEG = bytes(file(photo()))
BROKEN = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html><body>404</body></html>",
    "header only": JPEG[:200],
    "magic only": JPEG[:3],
    "cut": JPEG[: len(JPEG) // 2],
    "cut png": bytes(file(photo(), "PNG"))[:500],
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_errors(name):
    with pytest.raises(ValueError, match="not a readable"):
        open_image(memoryview(bytearray(BROKEN[name]))).window(Box(0, 0, 75, 101))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted({"JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "PPM"} & set(SAVE)))
def test_no_wrong_byte_of_a_files_head_is_more_than_a_bad_sample(kind):
    """Whatever a library raises of it: else one file would end a run."""
    whole = bytes(file(photo(16, 16), kind))
    for at in range(min(400, len(whole))):
        broken = bytearray(whole)
        broken[at] ^= 0xFF
        try:
            stored = open_image(memoryview(broken))
            stored.window(Box(0, 0, *stored.size))
        except ValueError as error:
            assert "image" in str(error) or "JPEG" in str(error)


def test_random_crop_is_pillows():
    """Mean difference to Pillow's own crop and resize of the same boxes: at most 0.05 of 255."""
    settings = Image(size=32, scale=(0.2, 1))
    decoder = ImageDecoder(settings, 0)
    data, differences = file(photo(120, 160), quality=90), []
    geometry = decoder.geometry(torch.zeros(20, dtype=torch.int64), torch.arange(20))
    for ((view,),) in zip(geometry, strict=True):
        (pixels,) = decoder.decode(data, [view])
        box = random_box((120, 160), settings, view.crop)
        around = (box.left, box.top, box.left + box.width, box.top + box.height)
        expected = stock(data).crop(around).resize((32, 32), PillowImage.Resampling.BICUBIC)
        if view.mirror:
            expected = expected.transpose(PillowImage.Transpose.FLIP_LEFT_RIGHT)
        difference = pixels.permute(1, 2, 0).int() - torch.from_numpy(np.asarray(expected).astype(np.int32))
        differences.append(difference.abs().float())
    assert torch.stack(differences).mean() <= 0.05 and torch.stack(differences).max() <= 1


@pytest.mark.parametrize("size", [(40, 100), (100, 40), (31, 33), (7, 9)])
@pytest.mark.parametrize(("target", "resized"), [((32, 32), 32), ((28, 28), 32), ((24, 32), 32)])
def test_center_is_torchvisions(size, target, resized):
    image = photo(*size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    found = center(pixels, target, target[1] / resized)
    assert found.shape == (3, *target)
    if target[0] == target[1]:
        expected = transforms.CenterCrop(target)(transforms.Resize(resized, BICUBIC)(image))
        assert np.abs(np.asarray(expected).astype(int) - found.permute(1, 2, 0).numpy()).max() <= 1


def test_a_decoder_cuts_the_fraction_that_is_set():
    decoder = ImageDecoder(Image(size=28, crop="center", crop_fraction=0.875), 0)
    ((view,),) = decoder.geometry(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    image = photo(40, 100)
    (found,) = decoder.decode(file(image, "PNG"), [view])
    expected = transforms.CenterCrop(28)(transforms.Resize(32, BICUBIC)(image))
    assert np.abs(np.asarray(expected).astype(int) - found.permute(1, 2, 0).numpy()).max() <= 1


def test_boxes_have_torchvisions_distribution():
    settings = Image(scale=(0.1, 0.9), ratio=(0.5, 2.0))
    ours = [random_box((60, 90), settings, u) for u in torch.rand(3000, 22, generator=torch.Generator().manual_seed(1))]
    torch.manual_seed(2)
    canvas = torch.empty(3, 60, 90)
    theirs = [transforms.RandomResizedCrop.get_params(canvas, [0.1, 0.9], [0.5, 2.0]) for _ in range(3000)]
    for part in range(4):
        assert stats.ks_2samp([b[part] for b in ours], [b[part] for b in theirs]).pvalue > 1e-3
    assert all(b.top >= 0 and b.top + b.height <= 60 and b.left >= 0 and b.left + b.width <= 90 for b in ours)


def test_boxes_reach_all_edges():
    """A square of 37 on each side, by its first number down and by its second to the right."""
    settings = Image(scale=(0.25, 0.25), ratio=(1, 1))
    assert random_box((60, 90), settings, [0.999, 0.0] + [0.5] * 20) == Box(23, 0, 37, 37)
    assert random_box((60, 90), settings, [0.0, 0.999] + [0.5] * 20) == Box(0, 53, 37, 37)


@pytest.mark.parametrize(("size", "box"), [((10, 1000), Box(0, 493, 10, 13)), ((1000, 10), Box(493, 0, 13, 10))])
def test_box_of_an_image_that_no_shape_fits(size, box):
    """As torchvision: the whole, cut in the middle to the nearest ratio allowed."""
    assert random_box(size, Image(scale=(0.9, 1.0)), [0.5] * 22) == box


def test_geometry_belongs_to_sample_epoch_and_view():
    decoder = ImageDecoder(Image(views=2), 3)
    ids = torch.tensor([5, 9, 5])
    first, other, again = decoder.geometry(torch.tensor([0, 0, 0]), ids)
    later = decoder.geometry(torch.tensor([1]), ids[:1])[0]
    assert first == again
    assert len({tuple(g.crop) for g in (*first, *other, *later)}) == 6
    mirrors = [g[0].mirror for g in decoder.geometry(torch.zeros(400, dtype=torch.int64), torch.arange(400))]
    assert 150 < sum(mirrors) < 250
    many = torch.arange(400)
    here = decoder.geometry(torch.zeros(400, dtype=torch.int64), many)
    for other in (decoder.geometry(torch.ones(400, dtype=torch.int64), many), [g[::-1] for g in here]):
        assert 150 < sum(a[0].mirror == b[0].mirror for a, b in zip(here, other, strict=True)) < 250
    for number in range(2):
        mean = sum(g[0].crop[number] for g in here if g[0].mirror) / sum(mirrors)
        assert 0.4 < mean < 0.6, "flips tell where crops are"
    seeded = ImageDecoder(Image(views=2), 4).geometry(torch.zeros(400, dtype=torch.int64), many)
    assert 150 < sum(a[0].mirror == b[0].mirror for a, b in zip(here, seeded, strict=True)) < 250
    assert not any(a[0].crop == b[0].crop for a, b in zip(here, seeded, strict=True))
    still = ImageDecoder(Image(flip=False), 3).geometry(torch.zeros(400, dtype=torch.int64), torch.arange(400))
    assert not any(g[0].mirror for g in still)


def test_two_views_are_the_single_ones():
    """Decoding the window around both crops does not change either."""
    data, both, one = file(photo()), ImageDecoder(Image(size=16, views=2), 0), ImageDecoder(Image(size=16), 0)
    geometry = both.geometry(torch.tensor([0]), torch.tensor([4]))[0]
    for pixels, view in zip(both.decode(data, geometry), geometry, strict=True):
        assert torch.equal(pixels, one.decode(data, [view])[0])


def test_mirror_and_plain_resize():
    image = photo(40, 30)
    data = file(image, "PNG")
    decoder = ImageDecoder(Image(size=(20, 24)), 0)
    plain, mirrored = (decoder.decode(data, [Geometry([0.3] * 22, mirror)])[0] for mirror in (False, True))
    assert torch.equal(plain.flip(-1), mirrored)
    resized = ImageDecoder(Image(size=(20, 24), crop="resize"), 0).decode(data, [Geometry([], False)])[0]
    expected = image.resize((24, 20), PillowImage.Resampling.BICUBIC)
    assert np.abs(np.asarray(expected).astype(int) - resized.permute(1, 2, 0).numpy()).max() <= 1


def test_labels():
    assert decode_label(memoryview(b" 12\n"), 13) == 12
    assert decode_label(memoryview(b"12"), 0) == decode_label(memoryview(b"\xef\xbb\xbf12"), 0) == 12
    for text in (b"", b"cat", b"-1", b"1.0", b"13"):
        with pytest.raises(ValueError, match="label"):
            decode_label(memoryview(text), 13)
    assert decode_label(memoryview(b"%d" % (2**63 - 1)), 0) == 2**63 - 1
    with pytest.raises(ValueError, match="label 9223372036854775808 is too large"):
        decode_label(memoryview(b"%d" % 2**63), 0)
