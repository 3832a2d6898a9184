"""Writing plain ustar archives: fast, the same bytes for the same samples, hashed and indexed on the way."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from zlib_ng.zlib_ng import crc32

BLOCK = 512
RECORD = 20 * BLOCK
"""Archives end with two zero blocks and are filled up to a multiple of this, as tar does."""
NAME_LENGTH = 100


class Member(NamedTuple):
    """Where one file's data lies in the archive."""

    extension: str
    offset: int
    size: int
    crc32: int
    """Of the data; by it the stream notices bit rot."""


# Everything of a header but name, size and checksum: mode 0644, owner 0:0 without names, time 0, a regular file.
_MIDDLE = b"0000644\0" + b"0000000\0" * 2
_AFTER_SIZE = b"00000000000\0"
_TAIL = b" 0" + b"\0" * 100 + b"ustar\x0000" + b"\0" * 247
_FIXED_SUM = sum(_MIDDLE) + sum(_AFTER_SIZE) + sum(_TAIL) - ord(" ") + 8 * ord(" ")


def header(name: bytes, size: int) -> bytes:
    """The 512 bytes before a regular file of ``size`` bytes. ``name`` is at most 100 bytes long."""
    assert 0 < len(name) <= NAME_LENGTH and size < 8**11, (name, size)
    digits = b"%011o\0" % size
    checksum = b"%06o\0" % (_FIXED_SUM + sum(name) + sum(digits))
    return b"".join((name.ljust(NAME_LENGTH, b"\0"), _MIDDLE, digits, _AFTER_SIZE, checksum, _TAIL))


class TarWriter:
    """An archive being written; hashes what it writes."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by finish or abort
        self._hash = hashlib.sha256()
        self.bytes = 0

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> list[Member]:
        """Write one sample's files, ``key.extension`` each, and say where their data lies."""
        pieces: list[bytes] = []
        places: list[Member] = []
        position = self.bytes
        for extension, data in members:
            size = len(data)
            pieces += (header(f"{key}.{extension}".encode(), size), data, bytes(-size % BLOCK))
            places.append(Member(extension, position + BLOCK, size, crc32(data)))
            position += BLOCK + size + -size % BLOCK
        self._write(b"".join(pieces))
        return places

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.bytes += len(data)

    def finish(self) -> str:
        """Write the end, push it to the disk and return the archive's sha256."""
        try:
            self._write(bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD))
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return self._hash.hexdigest()

    def abort(self) -> None:
        """Close without finishing."""
        self._file.close()


def sample_bytes(members: Sequence[tuple[str, bytes]]) -> int:
    """Bytes that a sample takes in an archive."""
    return sum(BLOCK + len(data) + -len(data) % BLOCK for _, data in members)
