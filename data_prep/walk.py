"""Reading tars strictly: what Python's tarfile and webdataset take for the end of an archive is told apart here.

tarfile ends in silence at a cut between members, inside a header, at a wrong checksum and at a zeroed block, and the
rest of the shard is lost. Here each of these is :class:`Damage`.
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from zlib_ng.zlib_ng import adler32, crc32

from data_prep.ustar import BLOCK, Member

CHUNK = 1024**2
"""Bytes read at once: what a core's own cache holds while they are hashed and looked through."""
_NOTHING = memoryview(b"")
_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]+)$", re.DOTALL)
"""Key and extension of a member, split at the first dot of its last part, as webdataset does."""
_ZERO = bytes(BLOCK)
_DIGITS = 18
"""Most of a number in an extended header: Python refuses to read thousands."""
_REGULAR = (b"0", b"\0", b"7")
_LINKS = (b"1", b"2")
_PASSED_OVER = {b"1": "links", b"2": "links", b"3": "devices", b"4": "devices", b"5": "", b"6": "pipes"}
"""And what they are called; folders have no name here."""
_EXTENDS = (b"x", b"g", b"L", b"K")
"""Headers that say more about the next one; those for all (g) do not matter here."""


class Buffer(Protocol):
    """Bytes, or what can be sliced like them."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> bytes: ...


class Damage(Exception):
    """The archive is not whole; the message says what is wrong and where."""


class Entry(NamedTuple):
    """A regular file in an archive."""

    name: str
    offset: int
    """Of its data."""
    size: int
    crc32: int
    """0 where the data was not read."""


def walk(
    data: Buffer, check: bool = True, passed: Counter[str] | None = None, files: Files | None = None
) -> Iterator[Entry]:
    """The regular files of a tar (v7, ustar, GNU, pax) in order.

    Args:
        data: The archive.
        check: Read the files' content too, for its CRC-32.
        passed: Counts what is passed over: links, devices, pipes, and folders without a name for them.
        files: Follows links to files before them; without it, and to anything else, they are passed over.

    Raises:
        Damage: anything but a whole archive up to its end marker and nothing after it.
    """
    at = 0
    while (step := next_file(data, at, check, passed, files)) is not None:
        entry, at = step
        yield entry


class Files:
    """The regular files of an archive by name, looked for once there is a link to one."""

    def __init__(self, data: Buffer) -> None:
        self._data = data
        self._found: dict[str, Entry] = {}
        self._until = 0

    def linked(self, name: str, target: str, at: int) -> Entry | None:
        """The last file called ``target`` before the header at ``at``, from now on also under another name."""
        while self._until < at and (step := next_file(self._data, self._until, check=False)) is not None:
            entry, until = step
            if until > at:
                break
            self._found[posixpath.normpath(entry.name)], self._until = entry, until
        entry = self._found.get(target)
        if entry is None:
            return None
        self._found[posixpath.normpath(name)] = entry._replace(name=name)
        return self._found[posixpath.normpath(name)]


def next_file(
    data: Buffer, at: int, check: bool = True, passed: Counter[str] | None = None, files: Files | None = None
) -> tuple[Entry, int] | None:
    """The first regular file from the header at ``at`` on, and where the next header begins; None at the end.

    Arguments, and what it raises, are those of :func:`walk`.
    """
    if len(data) == 0:
        raise Damage("empty file")
    extended: dict[str, str] = {}
    while (block := _header(data, at)) != _ZERO:
        kind, size = block[156:157], _number(block[124:136], at)
        begin = at + BLOCK
        if kind in _EXTENDS:
            extended |= _extension(data, at, kind, size)
        else:
            name = extended.get("path") or _name(block)
            size = int(extended.get("size", size)) if kind in _REGULAR else 0
            if begin + size > len(data):
                raise Damage(f"cut at byte {len(data)}: inside {name!r}")
            if kind in _REGULAR:
                if any(key.startswith("GNU.sparse.") for key in extended):
                    raise Damage(f"{name!r} is stored as a map of its parts: repack it without --sparse")
                found = crc32(data[begin : begin + size]) if check else 0
                return Entry(name, begin, size, found), begin + size + -size % BLOCK
            if kind in _LINKS and files is not None:
                target = _target(name, kind, extended.get("linkpath") or _text(block[157:257]))
                linked = files.linked(name, target, at)
                if linked is not None:
                    return linked, begin
            if kind not in _PASSED_OVER:
                raise Damage(f"member {name!r} of unknown kind {kind!r} at byte {at}")
            if passed is not None:
                passed[_PASSED_OVER[kind]] += 1
            extended = {}
        at = begin + size + -size % BLOCK
    _check_end(data, at)
    return None


def _extension(data: Buffer, at: int, kind: bytes, size: int) -> dict[str, str]:
    """What an extended header at ``at`` says about the next one."""
    body = data[at + BLOCK : at + BLOCK + size]
    if len(body) < size:
        raise Damage(f"cut at byte {len(data)}: inside a header's extension")
    if kind == b"x":
        return _pax(body, at)
    return {} if kind == b"g" else {"path" if kind == b"L" else "linkpath": _text(body)}


def _target(name: str, kind: bytes, target: str) -> str:
    """The name that a link leads to: of a hard one from the top, of a symbolic one from where it lies."""
    return posixpath.normpath(target if kind == b"1" else posixpath.join(posixpath.dirname(name), target))


def _header(data: Buffer, at: int) -> bytes:
    """The block at ``at``: a sound header, or zeros."""
    block = data[at : at + BLOCK]
    if len(block) < BLOCK:
        where = "not a tar archive" if at == 0 else f"cut at byte {len(data)}"
        raise Damage(f"{where}: " + ("inside a header" if block else "no end-of-archive blocks"))
    if block != _ZERO:
        _check_sum(block, at)
    return block


def _check_end(data: Buffer, at: int) -> None:
    if len(data) - at < 2 * BLOCK:
        raise Damage(f"cut at byte {len(data)}: inside the end-of-archive blocks")
    for begin in range(at, len(data), CHUNK):
        part = bytes(data[begin : begin + CHUNK])
        if part.count(0) != len(part):
            raise Damage(f"zeroed block at byte {at}: more data follows")


def _check_sum(block: bytes, at: int) -> None:
    try:
        promised = int(block[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        promised = -1
    # Adler-32's low half is 1 + the sum of the bytes, modulo 65521: the sum at twenty times the speed of sum().
    added = (adler32(block) & 0xFFFF) - 1 - sum(block[148:156]) + 8 * 32
    if (promised - added) % 65521 == 0 and promised >= 0:
        return
    signed = sum(b - 256 if b > 127 else b for b in block[:148] + block[156:]) + 8 * 32
    if promised != signed:
        raise Damage("not a tar archive" if at == 0 else f"header at byte {at} has a wrong checksum")


def _number(field: bytes, at: int) -> int:
    """An octal number, or GNU's base 256."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") - (0x80 << 88)
    digits = field.strip(b"\0 ") or b"0"
    if digits.strip(b"01234567"):
        raise Damage(f"header at byte {at} has no size")
    return int(digits, 8)


def _name(block: bytes) -> str:
    name = _text(block[:100])
    if block[345] and block[257:263] == b"ustar\0":
        name = f"{_text(block[345:500])}/{name}"
    return name


def _text(field: bytes) -> str:
    end = field.find(b"\0")
    return (field if end < 0 else field[:end]).decode("utf-8", "surrogateescape")


def _pax(body: bytes, at: int) -> dict[str, str]:
    """The records of an extended header: ``LENGTH KEY=VALUE\\n``."""
    records: dict[str, str] = {}
    while body.rstrip(b"\0"):
        length, _, _ = body.partition(b" ")
        if not length.isdigit() or len(length) > _DIGITS or not 4 < int(length) <= len(body):
            raise Damage(f"extended header at byte {at} is damaged")
        key, _, value = body[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        body = body[int(length) :]
    size = records.get("size", "0")
    if not size.isdecimal() or len(size) > _DIGITS:
        raise Damage(f"extended header at byte {at} is damaged")
    return records


def group(entries: Iterator[Entry], passed: Counter[str] | None = None) -> Iterator[tuple[str, list[Member]]]:
    """Samples as webdataset groups them: neighbours with the same key.

    Args:
        entries: Files.
        passed: Counts those that belong to no sample: hidden ones and those without an extension; what is written
            ``__so__`` belongs to none either, and does not count.

    Raises:
        Damage: a key that comes back later, or two files of the same name in a sample: webdataset would deliver half
            samples.
    """
    seen: set[str] = set()
    key, members = "", list[Member]()
    extensions: set[str] = set()
    for name, offset, size, check in entries:
        match = _NAME.match(name)
        if "/" not in name and name.startswith("__") and name.endswith("__"):
            continue
        if match is None:
            if passed is not None:
                hidden = name.rpartition("/")[2].startswith(".")
                passed["hidden files" if hidden else "files without an extension"] += 1
            continue
        prefix, extension = match.groups()
        extension = extension.lower()
        if prefix != key:
            if members:
                yield key, members
            key, members, extensions = prefix, [], set()
            if key in seen:
                raise Damage(f"key {key!r} occurs in two places")
            seen.add(key)
        if extension in extensions:
            raise Damage(f"{name!r} occurs twice")
        extensions.add(extension)
        members.append(Member(extension, offset, size, check))
    if members:
        yield key, members


class Parts:
    """A file of which only what is asked for is read."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self._size)
        return os.pread(self._file.fileno(), max(0, last - first), first)


class HashedFile:
    """A file read once from front to back and hashed on the way, that gives the parts that are asked for in order."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._buffer = bytearray(CHUNK)
        self._start = self._end = 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(self._size)
        window = self.window(first)
        return bytes(window[: last - first]) if last - first <= len(window) else self.read(first, last - first)

    def read(self, at: int, size: int) -> bytes:
        """A part that is not in memory as a whole; the window stays where it is."""
        return os.pread(self._file.fileno(), size, at)

    def window(self, at: int) -> memoryview:
        """What is in memory from byte ``at`` on, until what lies behind it is asked for; empty behind the end."""
        while at >= self._end and self._next():
            pass
        return memoryview(self._buffer)[at - self._start : self._end - self._start] if at >= self._start else _NOTHING

    def _next(self) -> bool:
        n = self._file.readinto(self._buffer)
        self._start, self._end = self._end, self._end + n
        self._hash.update(memoryview(self._buffer)[:n])
        return n > 0

    def sha256(self) -> str:
        """Hash of the whole file."""
        while self._next():
            pass
        return self._hash.hexdigest()
