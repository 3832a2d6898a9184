"""The archive writer against Python's tarfile, GNU tar's rules and hashlib."""

import hashlib
import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from data_prep.ustar import TarWriter, header, sample_bytes

NAMES = st.text("abcXYZ019_-/%~", min_size=1, max_size=80)


@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), max_size=8, unique_by=lambda s: s[0]))
def test_tarfile_reads_it(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    writer = TarWriter(path)
    places = [writer.add(key, [("bin", data), ("json", b"{}")]) for key, data in samples]
    before = writer.bytes
    digest = writer.finish()
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == digest
    assert len(content) == writer.bytes and len(content) % 10240 == 0
    assert before == sum(sample_bytes([("bin", data), ("json", b"{}")]) for _, data in samples)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        found = [(m.name, m.offset_data, m.size, m.mtime, m.mode, m.uid, m.isfile()) for m in tar]
    expected = []
    for (key, _), (image, table) in zip(samples, places, strict=True):
        expected.append((f"{key}.bin", image.offset, image.size, 0, 0o644, 0, True))
        expected.append((f"{key}.json", table.offset, table.size, 0, 0o644, 0, True))
    assert found == expected
    for (_, data), (image, _) in zip(samples, places, strict=True):
        assert content[image.offset : image.offset + image.size] == data


def test_header_is_what_tarfile_writes():
    info = tarfile.TarInfo("dir/some name.jpg")
    info.size = 123456
    theirs = info.tobuf(tarfile.USTAR_FORMAT)
    assert header(b"dir/some name.jpg", 123456) == theirs
