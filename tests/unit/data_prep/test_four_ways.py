"""A picture is the same whichever way it comes: built from a folder or from tars, taken as it is, or streamed."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.build import build
from data_prep.images import store
from data_prep.index import index
from data_prep.options import ImageOptions, Options
from data_prep.record import Rejected
from data_prep.sources.folder import FolderSource
from data_prep.sources.tars import TarsSource
from data_prep.verify import verify
from pipeline.core import image as rules
from pipeline.core.manifest import IMAGES
from pipeline.data.decode import open_image
from pipeline.data.jpeg import Box
from tests.unit.data_prep.samples import encoded, members, picture, write_tar

SIZE = (24, 20)
ALPHA = Image.fromarray((np.indices(SIZE[::-1])[1] * 10).astype(np.uint8))
KINDS = {"jpg": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "tif": "TIFF"}
KINDS |= {"tiff": "TIFF", "pgm": "PPM", "pbm": "PPM", "pnm": "PPM"}


def without_adobes_mark(data):
    at = data.index(b"\xff\xee")
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def over_white(colour, alpha):
    return np.round((np.asarray(colour, float) * alpha + 255.0 * (255 - alpha)) / 255)


def grey(values):
    return np.repeat(np.asarray(values, float)[..., None], 3, -1)


def odd_pictures():
    """Name to file and the pixels that it should give, worked out here."""
    rgb, wide = picture(3), np.linspace(0, 65535, SIZE[0] * SIZE[1]).astype(np.uint16).reshape(SIZE[::-1])
    alpha = np.asarray(ALPHA, float)[..., None]
    hidden = rgb.copy()
    hidden.putalpha(ALPHA)
    palette = rgb.quantize(8)
    clear = np.where((np.asarray(palette) == 3)[..., None], 255, np.asarray(palette.convert("RGB")))
    shade = np.asarray(picture(3, mode="L"))
    turn = Image.Exif()
    turn[0x0112] = 6
    cmyk = encoded(rgb.convert("CMYK"), "JPEG", quality=100)
    yield "16_bits.png", encoded(Image.fromarray(wide)), grey(np.round(wide / 257.0))
    yield "alpha.png", encoded(hidden), over_white(rgb, alpha)
    yield "alpha.webp", encoded(hidden, "WEBP", lossless=True, exact=True), over_white(rgb, alpha)
    both = Image.merge("LA", [picture(3, mode="L"), ALPHA])
    yield "grey_alpha.png", encoded(both), over_white(grey(shade), alpha)
    yield "clear_palette.png", encoded(palette, transparency=3), clear
    value = int(shade[0, 0])
    yield (
        "clear_grey.png",
        encoded(picture(3, mode="L"), transparency=value),
        grey(np.where(shade == value, 255, shade)),
    )
    yield "turned.png", encoded(rgb, exif=turn), np.rot90(np.asarray(rgb), -1)
    yield "cmyk.jpg", cmyk, np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB"))
    bare = without_adobes_mark(cmyk)
    yield "cmyk_without_mark.jpg", bare, np.asarray(Image.open(io.BytesIO(bare)).convert("RGB"))
    yield "png_called.jpg", encoded(rgb), np.asarray(rgb)
    yield "webp_called.png", encoded(rgb, "WEBP", lossless=True), np.asarray(rgb)
    for extension in IMAGES:
        data = encoded(picture(4), KINDS.get(extension, extension.upper()))
        yield f"plain.{extension}", data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


ODD = {name: (data, pixels) for name, data, pixels in odd_pictures()}


def streamed(data):
    stored = open_image(memoryview(bytearray(data)))
    return stored.window(Box(0, 0, *stored.size)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name", ODD)
def test_odd_pictures_are_the_same_every_way(tmp_path, name):
    """To rounding, and what re-encoding as JPEG changes."""
    data, pixels = ODD[name]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(data)
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/x.tar", {name: data})
    manifest = index(str(tmp_path / "tars"))
    assert list(manifest.fields) == ["image"] and not verify(str(tmp_path / "tars"), decode=1).problems
    assert np.abs(streamed(data).astype(float) - pixels).max() <= 1
    for source in (FolderSource(tmp_path / "in"), TarsSource([tmp_path / "tars"])):
        out = tmp_path / source.describe()["kind"]
        assert build(source, out, Options({})).counts.rejects == 0
        (stored,) = members(out / "train").values()
        found = np.asarray(Image.open(io.BytesIO(stored)).convert("RGB"))
        difference = np.abs(found.astype(float) - pixels)
        assert difference.mean() < 8 if name.startswith("cmyk") else difference.max() <= 1
        np.testing.assert_array_equal(streamed(stored), found)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_one_limit_of_pixels(tmp_path, monkeypatch, kind):
    data = encoded(picture(), kind)
    write_tar(tmp_path / "x.tar", {"a.jpg": data})
    index(str(tmp_path))
    monkeypatch.setattr(rules, "MAX_PIXELS", 480)
    assert streamed(data).shape == (20, 24, 3)
    assert store(data, ImageOptions()).data == data and not verify(str(tmp_path), decode=1).problems
    monkeypatch.setattr(rules, "MAX_PIXELS", 479)
    for read, error in ((streamed, ValueError), (lambda data: store(data, ImageOptions()), Rejected)):
        with pytest.raises(error, match="too many pixels: 24 x 20, most is 479"):
            read(data)
    assert "too many pixels" in verify(str(tmp_path), decode=1).problems["x.tar"][0]
