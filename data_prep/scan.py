"""What a shard holds, in one pass: every member checked, and the file hashed while it is read.

Plain members are taken many at a time (``headers.py``), others one by one (``walk.py``); the result is the same.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from zlib_ng.zlib_ng import crc32

from data_prep.headers import Run, plain_run
from data_prep.shards import shard_index
from data_prep.ustar import NAME_LENGTH, Member
from data_prep.walk import Damage, Entry, Files, HashedFile, group, next_file
from pipeline.core.manifest import ShardIndex

EXTENSIONS, EMPTY = 100, 20
"""Most extensions in a shard whose table has more than so many places for each member."""
FAR = 16 * 2**20
"""Bytes back to what a link leads to, at most: a sample is read from its first member to its last, and all between."""
_LONGEST = 16
"""Bytes of an extension that are compared in columns."""


@dataclass(frozen=True)
class Scan:
    """What a shard holds."""

    bytes: int
    sha256: str
    extensions: list[str]
    """In lower case, by name."""
    rows: ShardIndex
    """S samples; its columns are the extensions."""
    texts: dict[int, bytes]
    """Contents of members whose names end as was asked for, by their offset; not of all, where there are odd ones."""
    passed: Counter[str]
    """How many files of which kinds belong to no sample."""
    problem: str
    """What is wrong with it; empty when nothing is. The samples before the damage are listed."""


class _Members:
    """The members of a shard so far, in columns of parts.

    Args:
        data: The shard.
        texts: Ends of the names of those members whose content is kept.
    """

    def __init__(self, data: HashedFile, texts: tuple[bytes, ...]) -> None:
        self._data, self._ends = data, texts
        self.names: list[np.ndarray] = []
        """S100[N] each."""
        self.offset: list[np.ndarray] = []
        self.size: list[np.ndarray] = []
        """int64[N] each."""
        self.crc32: list[int] = []
        self.odd: dict[int, str] = {}
        """Names, by their number, that are longer."""
        self.texts: dict[int, bytes] = {}
        """See :attr:`Scan.texts`."""

    def add(self, run: Run, window: memoryview, at: int) -> None:
        """Add many; ``window`` holds the archive from ``at`` on, perhaps but for the end of the last one."""
        begins, ends = (run.offset - at).tolist(), (run.offset + run.size - at).tolist()
        contents: list[bytes | memoryview] = [window[begin:end] for begin, end in zip(begins, ends, strict=True)]
        if ends[-1] > len(window):
            contents[-1] = self._data.read(int(run.offset[-1]), int(run.size[-1]))
        self.names.append(run.names)
        self.offset.append(run.offset)
        self.size.append(run.size)
        self.crc32 += map(crc32, contents)
        if self._ends:
            chosen = [i for i, name in enumerate(run.names.tolist()) if name.endswith(self._ends)]
            self.texts.update(zip(run.offset[chosen].tolist(), [bytes(contents[i]) for i in chosen], strict=True))

    def add_one(self, entry: Entry) -> None:
        """Add a member that is not plain; of these no content is kept."""
        name = entry.name.encode("utf-8", "surrogateescape")
        if len(name) > NAME_LENGTH or b"\0" in name:
            self.odd[len(self.crc32)] = entry.name
        self.names.append(np.asarray([name], f"S{NAME_LENGTH}"))
        self.offset.append(np.asarray([entry.offset]))
        self.size.append(np.asarray([entry.size]))
        self.crc32.append(entry.crc32)

    def entries(self) -> list[Entry]:
        """The same, one by one."""
        names = [name.decode("utf-8", "surrogateescape") for part in self.names for name in part.tolist()]
        for number, name in self.odd.items():
            names[number] = name
        offset, size = ([n for part in parts for n in part.tolist()] for parts in (self.offset, self.size))
        return [Entry(*row) for row in zip(names, offset, size, self.crc32, strict=True)]


def scan(path: Path, texts: tuple[bytes, ...] = ()) -> Scan:
    """Walk a shard, and hash it. Missing files raise OSError.

    Args:
        path: A tar.
        texts: Ends of the names of those members whose content is kept: ``b".txt"``.
    """
    problem, passed = "", Counter[str]()
    with open(path, "rb", buffering=0) as f:
        os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        data = HashedFile(f)
        members = _Members(data, texts)
        try:
            _walk(data, members, passed)
        except Damage as damage:
            problem = str(damage)
        size, sha256 = len(data), data.sha256()
    table = _columns(members, whole=not problem) if members.names and not members.odd else None
    if table is None:
        table, again = _one_by_one(members, passed, whole=not problem)
        problem = again or problem
    passed = +Counter({kind: times for kind, times in passed.items() if kind})
    if passed and not table[1].keys:
        problem = problem or f"no samples, only {counted(passed)}: files are named like 0001.jpg"
    problem = problem or _not_text((*table[0], *table[1].keys))
    return Scan(size, sha256, *table, members.texts, passed, problem)


def counted(passed: Mapping[str, int]) -> str:
    """What was passed over, in words."""
    return ", ".join(f"{times:,} {kind}" for kind, times in sorted(passed.items()))


def _not_text(names: Sequence[str]) -> str:
    """What is wrong with names that no text file can hold; empty when nothing is."""
    try:
        "\0".join(names).encode()
    except UnicodeEncodeError as error:
        return f"a name is not UTF-8: {error.object[: error.end].rpartition(chr(0))[2]!r}; repack it"
    return ""


def _walk(data: HashedFile, members: _Members, passed: Counter[str]) -> None:
    at, files = 0, Files(data)
    while True:
        window = data.window(at)
        run = plain_run(np.frombuffer(window, np.uint8), at, len(data))
        if run is not None:
            members.add(run, window, at)
            at = run.until
        elif (step := next_file(data, at, passed=passed, files=files)) is not None:
            entry, after = step
            if at - entry.offset > FAR:
                passed[f"links to files more than {FAR // 2**20} MiB before them"] += 1
            elif entry.offset < at:  # what it leads to is read anew, for its CRC-32
                members.add_one(entry._replace(crc32=crc32(data.read(entry.offset, entry.size))))
            else:
                members.add_one(entry)
            at = after
        else:
            return


Table = tuple[list[str], ShardIndex]


def _too_many(keys: int, extensions: int, members: int) -> bool:
    """Whether a table of the members has hardly anything in it: names hold a number or hash behind their first dot."""
    return extensions > EXTENSIONS and keys * extensions > EMPTY * members


def _one_by_one(members: _Members, passed: Counter[str], whole: bool) -> tuple[Table, str]:
    """Extensions and rows, and what is wrong."""
    keys: list[str] = []
    rows: list[Sequence[Member]] = []
    problem = ""
    try:
        for key, found in group(iter(members.entries()), passed):
            keys.append(key)
            rows.append(found)
        if not whole:  # the last one may be half
            keys, rows = keys[:-1], rows[:-1]
    except Damage as damage:
        problem = str(damage)
    extensions = sorted({m.extension for found in rows for m in found})
    if _too_many(len(keys), len(extensions), sum(map(len, rows))):
        problem = f"{len(extensions):,} extensions in {len(keys):,} samples, like {extensions[0]!r}: a key ends at"
        return ([], shard_index((), (), ())), f"{problem} the first dot of a name; give names without other dots"
    return (extensions, shard_index(keys, rows, extensions)), problem


def _columns(members: _Members, whole: bool) -> Table | None:
    """What :func:`group` gives, for names that it would not stumble over; None if there are others."""
    names = np.concatenate(members.names)
    letters = names.view(np.uint8).reshape(len(names), NAME_LENGTH)
    width = int(np.flatnonzero(letters.any(0))[-1]) + 1
    letters = letters[:, :width]
    columns = np.arange(width)
    slash = letters == ord("/")
    last = np.where(slash.any(1), width - 1 - slash[:, ::-1].argmax(1), -1).astype(np.int8)
    dots = (letters == ord(".")) & (columns > last[:, None])
    dot = dots.argmax(1)
    hidden = (letters[:, :2] == ord("_")).all(1)
    if not dots.any(1).all() or (dot <= last + 1).any() or hidden.any():
        return None
    codes, extensions = _extensions(letters, dot)
    if extensions is None:
        return None
    prefix = letters * (columns < dot[:, None])
    first = np.ones(len(names), bool)
    first[1:] = (prefix[1:] != prefix[:-1]).any(1)
    keys = [key.decode("utf-8", "surrogateescape") for key in prefix[first].view(f"S{width}")[:, 0].tolist()]
    if _too_many(len(keys), len(extensions), len(names)):
        return None
    row = first.cumsum() - 1
    shape = (len(keys), len(extensions))
    offset, size, checks = (np.full(shape, -1, np.int64) for _ in range(3))
    offset[row, codes] = np.concatenate(members.offset)
    size[row, codes] = np.concatenate(members.size)
    checks[row, codes] = members.crc32
    if len(set(keys)) < len(keys) or (offset >= 0).sum() < len(names):
        return None
    index = ShardIndex(tuple(keys), offset, size, checks)
    return (extensions, index) if whole else _without_last(extensions, index)


def _without_last(extensions: list[str], rows: ShardIndex) -> Table:
    offset, size, crc32 = (a[:-1] for a in (rows.offset, rows.size, rows.crc32) if a is not None)
    held: list[bool] = np.atleast_1d((offset >= 0).any(axis=0)).tolist()
    left = [e for e, there in zip(extensions, held, strict=True) if there]
    return left, ShardIndex(rows.keys[:-1], offset[:, held], size[:, held], crc32[:, held])


def _extensions(letters: np.ndarray, dot: np.ndarray) -> tuple[np.ndarray, list[str] | None]:
    """Number of each name's extension among all, and the extensions in lower case by name; None if any is odd."""
    padded = np.pad(letters, ((0, 0), (0, _LONGEST + 1)))
    found = np.take_along_axis(padded, dot[:, None] + 1 + np.arange(_LONGEST + 1), 1)
    if found[:, _LONGEST].any() or (found >= 0x80).any() or not found[:, 0].all():
        return dot, None
    capital = (found >= ord("A")) & (found <= ord("Z"))
    lower = (found + capital * np.uint8(32))[:, :_LONGEST]
    halves = [np.unique(lower[:, i : i + 8].copy().view("<u8")[:, 0], return_inverse=True)[1] for i in (0, 8)]
    _, example, codes = np.unique(halves[0] * len(dot) + halves[1], return_index=True, return_inverse=True)
    words = [bytes(lower[i]).rstrip(b"\0").decode() for i in example]
    order = sorted(range(len(words)), key=words.__getitem__)
    rank = np.empty(len(words), np.int64)
    rank[order] = np.arange(len(words))
    return rank[codes], [words[i] for i in order]
