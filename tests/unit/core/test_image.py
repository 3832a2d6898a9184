"""What is read of an image file beside its pixels: its EXIF, against structures written by hand, and its end."""

import contextlib
import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipeline.core.image import ImageError, Picture, jpeg_is_whole, jpeg_orientation, orientation

SIX = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
PIXELS = np.arange(48 * 64 * 3).reshape(48, 64, 3).astype(np.uint8)


def file(kind, **options):
    target = io.BytesIO()
    Image.fromarray(PIXELS).save(target, kind, **options)
    return target.getvalue()


def tiff(entries, data=b"", order="<", count=None):
    """A block of EXIF with one table; each entry is tag, type, count, and four bytes."""
    head = b"II*\0" if order == "<" else b"MM\0*"
    packed = [struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries]
    return (
        head
        + struct.pack(order + "IH", 8, len(entries) if count is None else count)
        + b"".join(packed)
        + bytes(4)
        + data
    )


BLOCKS = {
    "little endian": (tiff([SIX]), 6),
    "big endian": (tiff([(0x0112, 3, 1, struct.pack(">HH", 8, 0))], order=">"), 8),
    "named": (b"Exif\0\0" + tiff([SIX]), 6),
    "named twice": (b"Exif\0\0Exif\0\0" + tiff([SIX]), 6),
    "after others": (tiff([(0x010F, 2, 4, b"abc\0"), SIX]), 6),
    "32 bits": (tiff([(0x0112, 4, 1, struct.pack("<I", 3))]), 3),
    "two of them": (tiff([(0x0112, 3, 2, struct.pack("<HH", 6, 1))]), 6),
    "beside a rational of zero": (tiff([SIX, (0x011A, 5, 1, struct.pack("<I", 38))], struct.pack("<ii", -1, 0)), 6),
    "beside what is far away": (tiff([SIX, (0x010F, 2, 4000, struct.pack("<I", 0xFFFFFF00))]), 6),
    "beside a table that is itself": (tiff([SIX, (0x8769, 4, 1, struct.pack("<I", 8))]), 6),
    "more promised than there": (tiff([SIX], count=60_000), 6),
    "words": (tiff([(0x0112, 2, 2, b"6\0\0\0")]), 1),
    "none of them": (tiff([(0x0112, 3, 0, struct.pack("<HH", 6, 0))]), 1),
    "nine": (tiff([(0x0112, 3, 1, struct.pack("<HH", 9, 0))]), 1),
    "nothing": (b"", 1),
    "a name": (b"Exif\0\0", 1),
    "garbage": (b"Exif\0\0garbage!!", 1),
    "as Python shows bytes": (b"b'Exif\\x00\\x00MM'", 1),
    "cut": (tiff([SIX])[:14], 1),
    "a table behind the end": (b"II*\0\xff\xff\xff\xff", 1),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_orientation_in_exif(name):
    """Alone, and in a file of each format that holds it: whatever is odd beside it, pixels are read."""
    block, expected = BLOCKS[name]
    assert orientation(block, None) == expected
    named = block if block.startswith(b"Exif\0\0") else b"Exif\0\0" + block
    whole = file("JPEG")
    jpeg = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(named) + 2) + named + whole[2:]
    assert jpeg_orientation(jpeg) == jpeg_orientation(memoryview(jpeg)) == expected
    chunk = b"eXIf" + block
    png = file("PNG").split(b"IEND")[0][:-4]
    png += struct.pack(">I", len(block)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + file("PNG")[-12:]
    for data in (jpeg, png, file("WEBP", exif=named)):
        assert Picture(data).decode().size == ((48, 64) if expected > 4 else (64, 48))


@pytest.mark.parametrize("words", ["b'Exif\\x00\\x00MM\\x00*\\x00'", "\nexif\n  10\nzzzz\n"])
@pytest.mark.parametrize("name", ["exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"])
def test_texts_in_a_png_are_texts(name, words):
    texts = PngInfo()
    texts.add_text(name, words)
    np.testing.assert_array_equal(Picture(file("PNG", pnginfo=texts)).decode().pixels, PIXELS)


def test_orientation_in_xmp():
    """Where EXIF states none; what is no orientation is not taken for one."""
    packet = b"http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation=%s/>"
    for words, expected in ((b'"6"', 6), (b"'8'", 8), (b'"9"', 1), (b'"six"', 1), (b'"61"', 1), (b'"\xff', 1)):
        body = packet % words
        whole = file("JPEG")
        data = whole[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + whole[2:]
        assert jpeg_orientation(data) == orientation(None, body) == expected
        assert Picture(data).decode().size == ((48, 64) if expected > 4 else (64, 48))
    assert orientation(tiff([(0x0112, 3, 1, struct.pack("<HH", 3, 0))]), packet % b'"6"') == 3
    assert orientation(None, "<tiff:Orientation>5</tiff:Orientation>") == 5


def test_markers_before_exif():
    """Others come first, filled up with bytes of all ones; one that claims no length does not hold up reading."""
    whole, block = file("JPEG"), b"Exif\0\0" + tiff([SIX])
    exif = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert jpeg_orientation(whole[:20] + b"\xff\xff" + exif + whole[20:]) == 6
    assert jpeg_orientation(whole[:2] + b"\xff\xe0\0\0" + exif + whole[2:]) == 1
    assert jpeg_orientation(whole[: whole.index(b"\xff\xda") + 30] + exif) == 1, "behind the first scan begins"
    for cut in range(40):
        assert jpeg_orientation((whole[:2] + exif)[:cut]) == 1 or cut > 30


def test_the_end_of_a_jpeg():
    whole = file("JPEG")
    thumbnail = whole[:2] + b"\xff\xe2\x00\x10" + b"\xff\xda\xff\xd9".ljust(14) + whole[2:]
    assert all(jpeg_is_whole(data) for data in (whole, memoryview(whole), whole + bytes(9), thumbnail))
    assert not any(jpeg_is_whole(data) for data in (whole[:-2], memoryview(whole[:-2]), thumbnail[:-2]))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_no_damage_of_exif_is_more_than_an_error(kind):
    """Up to four bytes of it wrong, in a file that is sound otherwise."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x0132] = 6, "Maker", "2020:01:01 00:00:00"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0hi"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    whole, dice, decoded = file(kind, exif=exif), random.Random(1), 0
    begin = {"JPEG": b"Exif\0\0", "PNG": b"eXIf", "WEBP": b"EXIF", "TIFF": b"II*", "AVIF": b"II*"}[kind]
    at = whole.find(begin) if whole.find(begin) >= 0 else whole.index(b"MM\0*")
    for _ in range(300):
        data = bytearray(whole)
        for place in dice.sample(range(at + 4, min(at + 300, len(data))), dice.choice([1, 2, 4])):
            data[place] = dice.choice([0, 1, 2, 12, 255, dice.randrange(256)])
        if kind == "PNG":  # as a program would that writes odd EXIF
            size = int.from_bytes(data[at - 4 : at], "big")
            data[at + 4 + size : at + 8 + size] = zlib.crc32(data[at : at + 4 + size]).to_bytes(4, "big")
        with contextlib.suppress(ImageError):
            decoded += Picture(bytes(data)).decode().pixels.size in ((64, 48), (48, 64))
    assert decoded > 100
