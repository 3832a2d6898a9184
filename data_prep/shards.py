"""Writing one split: shards, their indexes, and a note of what each finished shard covers, so that a build can go on.

A shard is finished when its note is there. Order of writing: tar under a temporary name, index, tar renamed, digests,
note. A kill before the note means that the shard is made again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_prep.duplicates import Print, pack, prints_name
from data_prep.options import Options
from data_prep.prepare import Sample
from data_prep.record import Record, readable, shortened
from data_prep.statistics import Statistics
from data_prep.store import Store
from data_prep.ustar import Member, TarWriter, sample_bytes
from pipeline.core.errors import DataError
from pipeline.core.manifest import FIELDS, Shard, ShardIndex, index_bytes, index_name

SOURCE, REASON = 1000, 500
"""Characters of the name of an input, and of why it was rejected, that are kept."""
WORK = ".build"
"""Folder of the notes, removed when the build is complete."""


def field_of(extension: str) -> str:
    """The manifest's field for a member's extension."""
    return next((name for name, known in FIELDS.items() if extension in known), extension)


def fields_of(extensions: Sequence[str], field: Callable[[str], str] = field_of) -> dict[str, tuple[str, ...]]:
    """Fields and the extensions that carry them, in the order of ``FIELDS``, others after them by name."""
    found: dict[str, set[str]] = {}
    for extension in extensions:
        found.setdefault(field(extension), set()).add(extension)
    rank = {name: i for i, name in enumerate(FIELDS)}
    return {f: tuple(sorted(found[f])) for f in sorted(found, key=lambda f: (rank.get(f, len(rank)), f))}


def shard_index(keys: Sequence[str], members: Sequence[Sequence[Member]], extensions: Sequence[str]) -> ShardIndex:
    """The index of one shard from what its samples hold; columns are extensions."""
    column = {name: i for i, name in enumerate(extensions)}
    offset = np.full((len(keys), len(column)), -1, np.int64)
    size, crc32 = offset.copy(), offset.copy()
    for row, places in enumerate(members):
        for m in places:
            c = column[m.extension]
            offset[row, c], size[row, c], crc32[row, c] = m.offset, m.size, m.crc32
    return ShardIndex(tuple(keys), offset, size, crc32)


@dataclass
class Note:
    """What a finished shard covers."""

    shard: dict[str, Any]
    until: int
    """All records of this split before this place in the input are in this shard, an earlier one, or rejected."""
    inputs: str
    """Digest of those records' keys and stamps."""
    extensions: list[str]
    statistics: dict[str, Any]
    rejects: list[dict[str, Any]]
    duplicates: list[dict[str, Any]]
    """Those that were reported and kept."""

    def light(self) -> Note:
        """The note without what grows with the samples; that stays on the disk until the build is finished."""
        return replace(self, rejects=[], duplicates=[])


class SplitWriter:
    """Writes one split's shards in the order of the input, from where finished shards end.

    ``again`` is what to do, beside building into a new folder, where the input is not what it was.
    """

    def __init__(
        self, store: Store, split: str, options: Options, first: int, notes: list[Note], again: str = "remove this one"
    ) -> None:
        self.split = split
        self.notes = notes
        self.resume_at = notes[-1].until if notes else 0
        self.rejects: list[dict[str, Any]] = []
        self.duplicates: list[dict[str, Any]] = []
        self._store = store
        self._options = options
        self._first = first
        self._again = again
        self._inputs = hashlib.sha256()
        self._checked = not notes
        self._tar: TarWriter | None = None

    def covers(self, place: int, record: Record) -> bool:
        """Whether this record belongs to a finished shard; called for all records in order.

        Raises:
            DataError: the input is not what the finished shards were made from.
        """
        if place < self.resume_at:
            self._count(record)
            return True
        self.check_inputs()
        return False

    def check_inputs(self) -> None:
        """Compare what finished shards were made from with what the source gives now, once all of it was seen."""
        if not self._checked and self.inputs != self.notes[-1].inputs:
            raise DataError(
                f"the input before sample {self.resume_at} is not what the {len(self.notes)} finished shards of "
                f"{self._store.where}/{self.split} were made from; build into a new folder, or {self._again}"
            )
        self._checked = True

    @property
    def inputs(self) -> str:
        """Digest of all records so far."""
        return self._inputs.hexdigest()

    def _count(self, record: Record) -> None:
        self._inputs.update(f"{record.key}\0{record.stamp}\n".encode("utf-8", "surrogatepass"))

    def reject(self, place: int, record: Record, reason: str) -> None:
        """Note that a record is not written."""
        self._count(record)
        self.rejects.append(self._line(place, record, reason))

    def report(self, place: int, record: Record, reason: str) -> None:
        """Note that a record is a duplicate; it is written none the less."""
        self.duplicates.append(self._line(place, record, reason))

    def _line(self, place: int, record: Record, reason: str) -> dict[str, Any]:
        return {
            "input": place,
            "split": self.split,
            "key": record.key,
            "source": readable(shortened(record.identity, SOURCE)),
            "reason": readable(shortened(reason, REASON)),
        }

    def add(self, place: int, record: Record, sample: Sample) -> None:
        """Write a sample, in a new shard if this one is full."""
        if self._tar is not None and self._full(sample):
            self.close_shard(place)
        if self._tar is None:
            self._open_shard()
            assert self._tar is not None
        self._count(record)
        self._members.append(self._tar.add(record.key, sample.members))
        self._keys.append(record.key)
        self._statistics.add(sample.facts)
        if sample.prints:
            self._prints.append(Print(place, record.key, sample.prints))

    def _full(self, sample: Sample) -> bool:
        assert self._tar is not None
        return (
            len(self._keys) >= self._options.shard_samples
            or self._tar.bytes + sample_bytes(sample.members) > self._options.shard_bytes
        )

    def _open_shard(self) -> None:
        self._name = f"{self.split}-{self._first + len(self.notes):06d}.tar"
        self._staged = self._store.staging(f"{self.split}/{self._name}")
        self._tar = TarWriter(self._staged)
        self._keys: list[str] = []
        self._members: list[list[Member]] = []
        self._statistics = Statistics()
        self._prints: list[Print] = []

    def close_shard(self, until: int) -> None:
        """Finish the shard that is being written, if any; it covers all records before ``until``."""
        if self._tar is None:
            return
        tar = self._tar
        sha256 = tar.finish()
        self._tar = None
        shard = Shard(self._name, len(self._keys), tar.bytes, sha256)
        extensions = sorted({m.extension for places in self._members for m in places})
        index = index_bytes(shard_index(self._keys, self._members, extensions), shard, extensions)
        self._store.write(f"{self.split}/{index_name(self._name)}", index)
        self._store.publish(self._staged, f"{self.split}/{self._name}")
        if self._prints:
            self._store.write(prints_name(self._name), pack(self._prints))
        note = Note(
            shard=asdict(shard),
            until=until,
            inputs=self.inputs,
            extensions=extensions,
            statistics=self._statistics.as_json(),
            rejects=self.rejects,
            duplicates=self.duplicates,
        )
        self._store.write(_note_name(self.split, len(self.notes)), json.dumps(asdict(note)).encode())
        self.notes.append(note.light())
        self.rejects, self.duplicates = [], []

    def abort(self) -> None:
        """Leave an unfinished shard behind, without its final name."""
        if self._tar is not None:
            self._tar.abort()


def _note_name(split: str, number: int) -> str:
    return f"{WORK}/{split}.{number:08d}.json"


def read_note(store: Store, split: str, number: int) -> Note:
    """The whole note of a finished shard."""
    return Note(**json.loads(store.read(_note_name(split, number))))


def finished(store: Store) -> list[tuple[str, int]]:
    """Split and number (from 0) of each finished shard, in order."""
    names = [name.split(".") for name in store.names(WORK)]
    return [(parts[0], int(parts[1])) for parts in names if len(parts) == 3 and parts[1].isdigit()]
