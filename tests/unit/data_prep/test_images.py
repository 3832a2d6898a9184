"""What images become, against Pillow asked directly and against closed forms."""

import contextlib
import io

import numpy as np
import pytest
from PIL import Image

from data_prep.images import decode, store
from data_prep.options import ImageOptions
from data_prep.record import Rejected
from pipeline.core import image as rules
from pipeline.core.errors import ConfigError
from tests.unit.data_prep.samples import encoded, picture

KEEP = ImageOptions()


def decoded(stored):
    return np.asarray(Image.open(io.BytesIO(stored.data)))


@pytest.mark.parametrize(("kind", "extension"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_are_kept_byte_for_byte(kind, extension, mode):
    data = encoded(picture(mode=mode), kind)
    stored = store(data, KEEP)
    assert (stored.data, stored.extension, stored.pixels.size) == (data, extension, (24, 20))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_become_png(kind):
    image = picture(mode="L")
    stored = store(encoded(image, kind), KEEP)
    assert stored.extension == "png"
    np.testing.assert_array_equal(Image.open(io.BytesIO(stored.data)).convert("L"), np.asarray(image))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture()
    transposed = {
        2: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: image.transpose(Image.Transpose.ROTATE_180),
        4: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.transpose(Image.Transpose.ROTATE_270),
        7: image.transpose(Image.Transpose.TRANSVERSE),
        8: image.transpose(Image.Transpose.ROTATE_90),
    }[orientation]
    stored = store(encoded(image, "PNG", exif=exif), KEEP)
    np.testing.assert_array_equal(decoded(stored), np.asarray(transposed))
    assert stored.pixels.size == transposed.size
    grey, expected = image.convert("L"), np.asarray(transposed.convert("L")).astype(int)
    jpeg = store(encoded(grey, "JPEG", exif=exif, quality=100), ImageOptions(quality=100))
    assert jpeg.extension == "jpg" and Image.open(io.BytesIO(jpeg.data)).getexif().get(0x0112) is None
    assert np.abs(decoded(jpeg) - expected).max() <= 3


@pytest.mark.parametrize("nonsense", [0, 9, 65_535])
def test_orientations_that_are_none_change_nothing(nonsense):
    exif = Image.Exif()
    exif[0x0112] = nonsense
    for kind in ("JPEG", "PNG"):
        data = encoded(picture(), kind, exif=exif)
        assert store(data, KEEP).data == data


def test_zeros_after_the_end_of_a_gif_do_no_harm():
    assert store(encoded(picture(), "GIF") + bytes(9), KEEP).extension == "png"


def test_too_little_memory_is_no_fault_of_the_image(monkeypatch):
    def full(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        decode(encoded(picture()))


def test_orientation_and_resize():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(size=(400, 200)), "JPEG", exif=exif)
    stored = store(data, ImageOptions("jpg", resize="short", size=50))
    assert stored.pixels.size == (50, 100)


def test_transparency_is_over_white():
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0], rgba[:4, :, 3], rgba[4:, :, 3] = 200, 255, 51
    for image in (Image.fromarray(rgba), Image.fromarray(rgba[..., [0, 3]])):
        stored = store(encoded(image), KEEP)
        out = decoded(stored)
        assert out.shape == (8, 8, 3)
        assert (out[:4, :, 0] == 200).all()
        # 0.2 * 200 + 0.8 * 255
        assert np.abs(out[4:, :, 0].astype(int) - 244).max() <= 1
    palette = picture().quantize(8)
    assert store(encoded(palette), KEEP).data == encoded(palette), "without transparency it is kept"
    out = decoded(store(encoded(palette, transparency=0), KEEP))
    assert (out[np.asarray(palette) == 0] == 255).all()


def test_sixteen_bits_keep_their_range():
    wide = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    stored = store(encoded(Image.fromarray(wide)), KEEP)
    np.testing.assert_array_equal(decoded(stored), np.round(wide / 257).astype(np.uint8))
    with pytest.raises(Rejected, match="floating-point"):
        store(encoded(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"), KEEP)
    for value in (65_536, -1):
        with pytest.raises(Rejected, match="32-bit"):
            store(encoded(Image.fromarray(np.full((4, 4), value, np.int32)), "TIFF"), KEEP)


def test_cmyk_becomes_rgb():
    image = picture().convert("CMYK")
    stored = store(encoded(image, "JPEG", quality=100), ImageOptions(quality=100))
    assert stored.extension == "jpg" and stored.pixels.mode == "RGB"
    assert np.abs(decoded(stored).astype(int) - np.asarray(picture())).mean() < 5


def test_black_and_white_stays_grey():
    image = picture(mode="1")
    assert store(encoded(image), KEEP).data == encoded(image)
    pixels = decode(encoded(image))[0].pixels
    assert pixels.mode == "L" and set(np.unique(np.asarray(pixels))) == {0, 255}


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_animations_the_first_frame(kind):
    first, second = picture(1), picture(2)
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(first, kind, save_all=True, append_images=[second], **options)
    stored = store(data, KEEP)
    assert stored.extension == "png"
    assert np.abs(decoded(stored)[..., :3].astype(int) - np.asarray(first)).mean() < 12


def test_nothing_but_pixels_is_written():
    exif = Image.Exif()
    exif[0x010E] = "secret"
    data = encoded(picture(), "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret" * 40)
    for extension in ("jpg", "webp", "png"):
        stored = store(data, ImageOptions(extension))
        assert b"secret" not in stored.data and stored.extension == extension


@pytest.mark.parametrize(
    ("resize", "size", "expected"),
    [
        ("short", 30, (60, 30)),
        ("long", 30, (30, 15)),
        ("crop", 30, (30, 30)),
        ("short", 100, (120, 60)),
        ("crop", 100, (120, 60)),
        ("long", 120, (120, 60)),
    ],
)
def test_resize(resize, size, expected):
    stored = store(encoded(picture(size=(120, 60))), ImageOptions("png", resize=resize, size=size))
    assert stored.pixels.size == expected
    larger = store(encoded(picture(size=(20, 10))), ImageOptions("png", resize=resize, size=40, enlarge=True))
    assert larger.pixels.size == {"short": (80, 40), "long": (40, 20), "crop": (40, 40)}[resize]


def test_crop_takes_the_centre():
    pixels = np.zeros((60, 180, 3), np.uint8)
    pixels[:, 60:120] = 255
    stored = store(encoded(Image.fromarray(pixels)), ImageOptions("png", resize="crop", size=20))
    assert decoded(stored)[:, 2:-2].min() == 255


@pytest.mark.parametrize("size", [(60, 30), (30, 61), (30, 30)])
def test_crop_of_what_has_the_size_already(size):
    """A square is cut out of its middle, without touching a pixel."""
    image = picture(size=size)
    stored = store(encoded(image), ImageOptions("png", resize="crop", size=30))
    left, top = (size[0] - 30) // 2, (size[1] - 30) // 2
    np.testing.assert_array_equal(decoded(stored), np.asarray(image)[top : top + 30, left : left + 30])


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_quality_decides_the_bytes(kind):
    """Of what is encoded because it was asked for, and of what has to be."""
    exif = Image.Exif()
    exif[0x0112] = 3
    turned = encoded(picture(size=(64, 64)), "JPEG", exif=exif, quality=98)
    for options in ({"format": kind}, {}):
        sizes = [len(store(turned, ImageOptions(quality=q, **options)).data) for q in (10, 60, 97)]
        assert sizes[0] < sizes[1] < sizes[2]


def test_reduced_decoding_is_close_to_the_full_one():
    data = encoded(picture(size=(640, 480)), "JPEG", quality=95)
    stored = store(data, ImageOptions("png", resize="short", size=60))
    full = Image.open(io.BytesIO(data)).resize((80, 60), Image.Resampling.BICUBIC)
    assert np.abs(decoded(stored).astype(int) - np.asarray(full)).max() <= 3


def test_enough_is_left_where_a_part_is_decoded():
    """At least twice of what is asked for; an eighth is the least that there is."""
    data = encoded(picture(size=(640, 480)), "JPEG")
    found = {near: decode(data, near)[0] for near in (0, 10, 30, 31, 60, 61, 120, 121, 400)}
    assert {near: one.pixels.size[1] for near, one in found.items()} == {
        **{0: 480, 10: 60, 30: 60, 31: 120, 60: 120},
        **{61: 240, 120: 240, 121: 480, 400: 480},
    }
    assert {one.size for one in found.values()} == {(640, 480)}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_truncated_files_are_rejected(kind):
    data = encoded(picture(size=(64, 64)), kind)
    for cut in (len(data) // 3, len(data) - 40, len(data) - 12):
        with pytest.raises(Rejected):
            store(data[:cut], KEEP)


def test_only_the_end_missing_is_rejected():
    for kind, tail in (("JPEG", 2), ("PNG", 12), ("GIF", 1)):
        with pytest.raises(Rejected, match="has no end"):
            store(encoded(picture(), kind)[:-tail], KEEP)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"<html></html>", b"%PDF-1.4", b"GIF89a", b"RIFF\0\0\0\0WEBP"])
def test_what_is_no_image_is_rejected(data):
    with pytest.raises(Rejected):
        store(data, KEEP)


def test_other_formats_are_rejected():
    for kind in ("ICO", "JPEG2000", "TGA"):
        with pytest.raises(Rejected, match="not an image in a known format"):
            store(encoded(picture(), kind), KEEP)


def test_bombs_are_rejected_before_they_are_unpacked(monkeypatch):
    data = encoded(Image.new("1", (20_000, 20_000)))
    with pytest.raises(Rejected, match="too many pixels"):
        store(data, KEEP)
    monkeypatch.setattr(rules, "MAX_PIXELS", 400)
    with pytest.raises(Rejected, match="too many pixels"):
        store(encoded(picture()), KEEP)


def test_random_damage_never_escapes():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        data = np.frombuffer(encoded(picture(), kind), np.uint8)
        for _ in range(40):
            bad = data.copy()
            bad[rng.integers(0, len(bad), 4)] = rng.integers(0, 256, 4)
            with contextlib.suppress(Rejected):
                store(bad.tobytes(), KEEP)


@pytest.mark.parametrize(("kind", "side"), [("webp", 16_384), ("jpg", 65_501)])
def test_what_a_format_cannot_hold_is_rejected(kind, side):
    with pytest.raises(Rejected, match=f"{side} x 1 pixels cannot be stored as {kind}"):
        store(encoded(Image.new("L", (side, 1))), ImageOptions(kind))
    assert store(encoded(Image.new("L", (side, 1))), ImageOptions("png")).extension == "png"


def test_options_that_do_not_fit():
    for wrong in ({"resize": "short"}, {"size": 3}, {"resize": "short", "size": 3}, {"quality": 0}, {"format": "gif"}):
        with pytest.raises(ConfigError):
            ImageOptions(**wrong)
