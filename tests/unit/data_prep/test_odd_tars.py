"""Tars as old and odd programs write them: all that is not damaged is found, as Python's tarfile finds it."""

import io
import tarfile
import zlib
from contextlib import closing

import numpy as np
import pytest

from data_prep import walk as walking
from data_prep.index import index
from data_prep.scan import scan
from data_prep.verify import verify
from data_prep.walk import Damage, group, walk
from pipeline.core.manifest import load_index
from pipeline.data.selected import open_reader
from tests.unit.data_prep.samples import png
from tests.unit.data_prep.test_headers import archive
from tests.unit.data_prep.test_scan import _tar

END = bytes(10240)


def member(name: str, data: bytes, changes: dict[int, bytes] | None = None, signed: bool = False) -> bytes:
    """A file in a tar, some bytes of its header changed, and the checksum made to fit; ``signed``: as Sun's tar did."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    head = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    for at, content in (changes or {}).items():
        head[at : at + len(content)] = content
    head[148:156] = b" " * 8
    total = sum(b - 256 if signed and b > 127 else b for b in head)
    head[148:156] = b"%06o\0 " % total
    return bytes(head) + data + bytes(-len(data) % 512)


def scanned(folder, data):
    (folder / "x.tar").write_bytes(data)
    return scan(folder / "x.tar", (b".txt",))


def theirs(data):
    """Name, offset, size and CRC-32 of each file that tarfile finds."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files = [m for m in tar if m.isfile()]
        return [(m.name, m.offset_data, m.size, zlib.crc32(data[m.offset_data :][: m.size])) for m in files]


def ours(found):
    """The same, of a scan."""
    columns = (a.tolist() for a in (found.rows.offset, found.rows.size, found.rows.crc32))
    rows = zip(found.rows.keys, *columns, strict=True)
    cells = [
        (f"{key}.{e}", *cell)
        for key, *row in rows
        for e, *cell in zip(found.extensions, *row, strict=True)
        if cell[0] >= 0
    ]
    return sorted(cells, key=lambda cell: cell[1])


ODD = {
    "size in base 256": member("b.txt", b"12345", {124: b"\x80" + bytes(10) + b"\x05"}),
    "old tar: no kind, no magic": member("b.txt", b"12345", {156: b"\0", 257: bytes(255)}),
    "contiguous": member("b.txt", b"12345", {156: b"7"}),
    "a name in two parts": member("b.txt", b"12345", {345: b"dir/more"}),
    "a name with something after its end": member("b.txt", b"12345", {6: b"junk"}),
    "blanks around the size": member("b.txt", b"12345", {124: b"          5 "}),
    "a folder between": member("dir/", b"", {156: b"5"}) + member("b.txt", b"12345"),
    "checksum of signed bytes": member("\u00e4\u00fc.txt", b"12345", signed=True),
    "a time and a size before it": (
        member("pax", b"20 mtime=1795327398\n10 size=5\n", {156: b"x"}) + member("b.txt", b"12345", {124: b"0" * 11})
    ),
    "a path for a folder, not for what follows": (
        member("pax", b"12 path=abc\n", {156: b"x"}) + member("d", b"", {156: b"5"}) + member("b.txt", b"12345")
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_odd_programs_write_is_found(tmp_path, kind):
    data = member("a.jpg", b"x" * 700) + ODD[kind] + member("c.jpg", b"y" * 512) + END
    found = scanned(tmp_path, data)
    assert found.problem == ""
    assert ours(found) == theirs(data) and len(found.rows.keys) == 3


@pytest.mark.parametrize("magic", [b"ustar  \0", bytes(8)])
def test_times_are_no_part_of_a_name(tmp_path, magic):
    """GNU's tar keeps the time of reading where ustar has a name's first part; tarfile takes it for one."""
    odd = member("b.jpg", b"2", {257: magic, 345: b"15000000000\0"})
    found = scanned(tmp_path, member("a.jpg", b"1") + odd + END)
    assert (found.rows.keys, found.problem) == (("a", "b"), "")


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (member("d.jpg", b"z", {156: b"D"}), "of unknown kind b'D'"),
        (END[512:] + bytes(2 * walking.CHUNK) + b"x", "more data follows"),
        (member("d.jpg", b"z")[:512], "cut at byte"),
        (member("pax", b"9" * 5000 + b" a=b\n", {156: b"x"}), "extended header at byte"),
        (member("pax", b"5012 size=" + b"9" * 5001 + b"\n", {156: b"x"}), "extended header at byte"),
    ],
)
def test_damage_behind_what_is_whole(tmp_path, more, problem):
    data = member("a.jpg", b"x") + bytes(1024 if more[:1] == b"\0" else 0) + more
    assert problem in scanned(tmp_path, data).problem


def test_half_an_end(tmp_path):
    """One block of zeros is what a cut leaves."""
    assert "inside the end-of-archive blocks" in scanned(tmp_path, member("a.jpg", b"x") + bytes(512)).problem


PLACES = (0, 1, 50, 98, 99, 100, 107, *range(124, 137), *range(148, 158), *range(257, 265), 345, 346, 500, 511)


@pytest.mark.parametrize("fitting", [False, True])
def test_a_byte_changed_in_a_header_is_judged_the_same_by_both_readers(tmp_path, fitting):
    """Many headers at once give what one by one gives, whatever is in them."""
    before, after = member("a.jpg", b"x" * 600), member("c.jpg", b"y") + member("c.txt", b"z" * 700) + END
    whole = bytearray(member("b.jpg", b"1" * 64))
    for at in PLACES:
        for value in {whole[at] ^ 1, whole[at] ^ 0x80, 0, ord(" "), ord("8"), ord("x")} - {whole[at]}:
            if value > 127 and not 100 <= at < 345:
                continue  # no UTF-8, of which only scan has an opinion
            changed = bytearray(whole)
            changed[at] = value
            if fitting and not 148 <= at < 156:
                changed[148:156] = b"%06o\0 " % (sum(changed[:148]) + 8 * 32 + sum(changed[156:512]))
            data = before + bytes(changed) + after
            rows, problem = [], ""
            try:
                for _, members in group(walk(data)):
                    rows += [(m.extension, *m[1:]) for m in members]
            except Damage as damage:
                problem = str(damage)
            found = scanned(tmp_path, data)
            assert found.problem == problem, (at, value)
            assert [(name.partition(".")[2], *cell) for name, *cell in ours(found)] == rows, (at, value)


@pytest.mark.parametrize("digits", [b"%06o\0 ", b"%06o \0", b"%07o\0", b" %05o\0 ", b"%05o8\0 ", b"%06o\0x", b"%06ox "])
def test_ways_to_write_a_checksum(tmp_path, digits):
    """The sum is right in all; in some it is not written as a number."""
    block = bytearray(member("b.jpg", b"12345"))
    total = sum(block[:148]) + 8 * 32 + sum(block[156:512])
    block[148:156] = digits % (total // 8 - 1 if b"8" in digits else total)
    data = member("a.jpg", b"1") + bytes(block) + END
    found = scanned(tmp_path, data)
    try:
        names = [entry.name for entry in walk(data)]
    except Damage as damage:
        names, problem = ["a.jpg"], str(damage)
        assert found.problem == problem
    assert len(found.rows.keys) == len(names) - (found.problem != "")


def test_texts_are_whole_where_they_cross_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(walking, "CHUNK", 1024)
    files = [(f"{i}.{e}", bytes([65 + i]) * (700 + i)) for i in range(6) for e in ("jpg", "txt")]
    data = archive(files, tarfile.GNU_FORMAT)
    found = scanned(tmp_path, data)
    assert sorted(found.texts.values()) == [content for name, content in files if name.endswith("txt")]


def test_what_is_measured_of_texts(tmp_path):
    """Also of those whose names take more than a header, and of those that are no UTF-8; labels with blanks."""
    folder = "long" * 24
    content = {"a.jpg": png(), "a.txt": "\u00e4\u00f6".encode(), "a.cls": b" 3\n", "b.jpg": png(), "b.txt": b"\xff abc"}
    content |= {f"{folder}/c.jpg": png(), f"{folder}/c.txt": b"1234567", f"{folder}/c.cls": b"3"}
    _tar(tmp_path / "x.tar", content, tarfile.GNU_FORMAT)
    statistics = index(str(tmp_path)).statistics
    length = statistics["measures"]["caption_length"]
    assert (length["count"], length["sum"], length["min"], length["max"]) == (3, 2 + 5 + 7, 2, 7)
    assert statistics["labels"] == {"3": 2}


def test_images_of_several_formats_are_all_measured(tmp_path):
    _tar(tmp_path / "x.tar", {"a.jpg": b"1" * 64, "b.png": b"2" * 500, "c.txt": b"no image"})
    size = index(str(tmp_path)).statistics["measures"]["image_bytes"]
    assert (size["count"], size["sum"], size["min"], size["max"]) == (2, 564, 64, 500)
    assert size["below"] == {"128": 1, "512": 1}


@pytest.mark.parametrize("length", [99, 100, 101, 102])
def test_names_about_as_long_as_a_header_holds(tmp_path, length):
    key = "k" * (length - 4)
    _tar(tmp_path / "x.tar", {"a.jpg": b"1", f"{key}.jpg": b"2", f"{key}.txt": b"3"})
    found = scan(tmp_path / "x.tar")
    assert (found.rows.keys, found.extensions) == (("a", key), ["jpg", "txt"])


def test_extensions_told_apart_after_many_letters_and_in_lower_case(tmp_path):
    names = ["a.segmentation.A", "a.segmentation.b", "a.segmentation.Z", "a.segmentation", "a.JPG"]
    _tar(tmp_path / "x.tar", {name: name.encode() for name in names})
    found = scan(tmp_path / "x.tar")
    assert found.extensions == ["jpg", *(f"segmentation{end}" for end in ("", ".a", ".b", ".z"))]
    assert (found.rows.offset >= 0).all()


@pytest.mark.parametrize("length", [20, 90, 95, 99, 100])
def test_the_first_dot_after_the_last_slash_divides_whatever_the_longest_name_is(tmp_path, length):
    names = ["class/img.seg.png", "k" * (length - 4) + ".png"]
    _tar(tmp_path / "x.tar", {name: name.encode() for name in names})
    found = scan(tmp_path / "x.tar")
    assert found.rows.keys == ("class/img", "k" * (length - 4))
    assert found.extensions == ["png", "seg.png"]


def test_names_with_folders_are_not_taken_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.scan._one_by_one", lambda *_, **more: pytest.fail("slow"))
    _tar(
        tmp_path / "x.tar",
        {f"{folder}{i}.{e}": b"" for folder in ("", "a/", "a/b.c/") for i in "12" for e in ("jpg", "cls")},
    )
    assert len(scan(tmp_path / "x.tar").rows.keys) == 6


def test_extensions_that_begin_alike_in_different_samples(tmp_path):
    _tar(tmp_path / "x.tar", {"a.segmentation": b"1", "b.segmentati": b"2", "c.segmentatioN": b"3", "d.jpg": b"4"})
    found = scan(tmp_path / "x.tar")
    assert found.extensions == ["jpg", "segmentati", "segmentation"]
    assert (found.rows.offset >= 0).tolist() == [
        [False, False, True],
        [False, True, False],
        [False, False, True],
        [True, False, False],
    ]


def test_names_between_underscores_belong_to_no_sample(tmp_path):
    _tar(tmp_path / "x.tar", {"__about.this__": b"1", "__a.jpg": b"2", "d/__b.c__": b"3", "__d/e.f__": b"4"})
    assert scan(tmp_path / "x.tar").rows.keys == ("__a", "d/__b", "__d/e")
    assert [key for key, _ in group(walk((tmp_path / "x.tar").read_bytes()))] == ["__a", "d/__b", "__d/e"]


def test_an_extension_that_is_not_utf8(tmp_path):
    _tar(tmp_path / "x.tar", {"a.jpg": b"1", "a.j\udcffg": b"2"})
    assert "not UTF-8: 'j\\udcff'" in scan(tmp_path / "x.tar").problem


def test_of_a_cut_tar_what_is_whole_is_described(tmp_path):
    data = archive([("a.jpg", b"1"), ("b.jpg", b"2"), ("b.npy", b"3"), ("c.jpg", b"4")], tarfile.GNU_FORMAT)
    found = scanned(tmp_path, data[: 512 * 5 + 100])
    assert (found.rows.keys, found.extensions, found.rows.offset.shape) == (("a",), ["jpg"], (1, 1))


def test_what_was_left_out_is_said_and_what_was_known_is_kept(tmp_path):
    from pipeline.core.manifest import load, save

    _tar(tmp_path / "a.tar", {"a.jpg": b"1"})
    (tmp_path / "b.tar").write_bytes(b"no tar")
    first = index(str(tmp_path), skip_damaged=True)
    assert first.made["indexed"] == {"tars": 1, "left_out": ["b.tar: not a tar archive: inside a header"]}
    from dataclasses import replace

    save(replace(first, tokenizer={"file": "t.json", "sha256": "0" * 64}, made={"mine": 1, "indexed": {}}), tmp_path)
    (tmp_path / "b.tar").unlink()
    again = index(str(tmp_path))
    assert again == load(tmp_path) and load_index(again, again.shards[0]).keys == ("a",)
    assert again.tokenizer == {"file": "t.json", "sha256": "0" * 64}
    assert again.made == {"mine": 1, "indexed": {"tars": 1, "left_out": []}}


def _linked(path, far=0):
    """Samples "a" and "b" of a folder, whose second image is a link to the first one; ``far`` bytes lie between."""
    with tarfile.open(path, "w") as tar:

        def add(name, content=b"", kind=tarfile.REGTYPE, target=""):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, target
            tar.addfile(info, io.BytesIO(content))

        add("k/a.jpg", b"image")
        add("k/a.cls", b"1")
        if far:
            add("k/between.jpg", bytes(far))
            add("k/between.cls", b"1")
        add("k/b.jpg", kind=tarfile.SYMTYPE, target="a.jpg")
        add("k/b.cls", b"2")
        add("k/c.jpg", kind=tarfile.LNKTYPE, target="k/a.jpg")
        add("k/c.cls", kind=tarfile.LNKTYPE, target="k/b.cls")
        add("k/d.jpg", kind=tarfile.SYMTYPE, target="k/a.jpg")  # k/k/a.jpg, which there is not
        add("k/d.cls", b"3")


def test_links_to_files_before_them_are_read_as_those(tmp_path):
    _linked(tmp_path / "x.tar")
    manifest = index(str(tmp_path))
    assert load_index(manifest, manifest.shards[0]).keys == ("k/a", "k/b", "k/c", "k/d")
    assert manifest.statistics["labels"] == {"1": 1, "2": 2, "3": 1}
    with closing(open_reader(manifest, ["image", "label"], [], None, 10**6)) as reader:
        (read,) = reader.read(np.arange(4))
    *found, bare = [read.found[row] for row in np.argsort(read.rows)]
    images, labels = zip(*((bytes(m["image"]), bytes(m["label"])) for m in found), strict=True)
    assert images == (b"image",) * 3 and labels == (b"1", b"2", b"2")
    assert "no field 'image'" in str(bare)
    assert verify(str(tmp_path)).problems == {}


def test_links_far_back_are_counted_since_all_between_would_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.scan.FAR", 2**20)
    for far, links in ((2**20 - 6000, 1), (2**20, 3)):
        _linked(tmp_path / "x.tar", far)
        found = scan(tmp_path / "x.tar")
        assert sum(found.passed.values()) == links and found.problem == ""
    assert found.passed["links to files more than 1 MiB before them"] == 2
